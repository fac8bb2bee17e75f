"""The servers of the peers table: each is started with two compute threads and ended with its
whole process group, whatever happens. All have the built-in model's weights, none quantised anew:
the .gguf file itself, or what it says in a float format. Called by tests/peers/measures.py.
"""

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, NamedTuple

import httpx

from cluster.settings import Settings
from models.resolve import resolve
from tests.cluster_ray.machine import free_port
from tests.live.service import MODEL, service, wait_for
from tests.peers.load import Endpoint
from tests.prove import environments

THREADS = 2
START_S = 400.0  # vLLM compiles
SLOTS = 64
SLOT_TOKENS = 1024  # the longest prompt of the load and its answer
CONTEXT_TOKENS = 8192  # the model's, for the loads that go up to it
IGNORE_EOS = {"ignore_eos": True}


class Engine(NamedTuple):
    """A program, the format of its weights, its version, and how to run it for a while."""

    name: str
    weights: str
    version: str
    run: Callable[[], AbstractContextManager[Endpoint]]


@contextlib.contextmanager
def sanderling(*settings: str) -> Iterator[Endpoint]:
    """`sanderling up`."""
    with service(*settings) as live:
        yield Endpoint(live.url, MODEL, IGNORE_EOS)


@contextlib.contextmanager
def llama_cpp(
    source: Path | None = None, slots: int = SLOTS, slot_tokens: int = SLOT_TOKENS
) -> Iterator[Endpoint]:
    """llama-server with a slot of its own for each stream; source: a .gguf file, None for the
    one that was published."""
    program, path = environments.llama_cpp() / "llama-server", source or resolve(Settings().model)
    command = [str(program), "-m", str(path), "--alias", MODEL, "--no-webui", "--offline"]
    command += ["-t", str(THREADS), "-tb", str(THREADS), "--no-kv-unified"]
    command += ["-np", str(slots), "-c", str(slots * slot_tokens), "--cache-ram", "512"]
    with _served(command, {}) as url:
        yield Endpoint(url, MODEL, IGNORE_EOS)


@contextlib.contextmanager
def vllm() -> Iterator[Endpoint]:
    """vLLM's build for CPUs, with the prefix cache it has by default."""
    programs, weights = environments.vllm(), environments.exported("bfloat16")
    # Its command `vllm` asks for the version of a distribution that is called otherwise.
    command = [str(programs / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(weights), "--served-model-name", MODEL]
    command += ["--max-model-len", str(CONTEXT_TOKENS), "--dtype", "bfloat16"]
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:THREADS])
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": cores,  # left alone, it keeps a core for its HTTP
        "VLLM_NO_USAGE_STATS": "1",
        "PATH": f"{programs}:{os.environ['PATH']}",  # where its compiler finds ninja
    }
    with _served(command, settings) as url:
        yield Endpoint(url, MODEL, IGNORE_EOS)


@contextlib.contextmanager
def transformers() -> Iterator[Endpoint]:
    """`transformers serve` with continuous batching. It knows no ignore_eos: its weights name no
    end instead."""
    program = Path(sys.executable).parent / "transformers"
    weights = str(environments.exported("float32"))
    command = [str(program), "serve", weights, "--device", "cpu", "--dtype", "float32"]
    command += ["--continuous-batching", "--cb-num-blocks", "160", "--cb-max-batch-tokens", "512"]
    with _served(command, {}) as url:
        yield Endpoint(url, weights)


@contextlib.contextmanager
def _served(command: list[str], settings: dict[str, str]) -> Iterator[str]:
    """The URL of a program that takes --host and --port, once it answers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
    with tempfile.TemporaryDirectory(prefix="peer-") as folder, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**os.environ, **offline, **settings},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(lambda: _answers(url, process, log), command[0], START_S)
            yield url
        finally:
            _end(process)


def _answers(url: str, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> bool:
    if process.poll() is not None:
        log.seek(0)
        said = log.read()[-2000:].decode(errors="replace")
        raise RuntimeError(f"ended with {process.returncode} before it answered: {said}")
    time.sleep(0.2)
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The program and whatever it started, which is all of its group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _alone(*settings: str) -> AbstractContextManager[Endpoint]:
    """One replica with the threads of a peer; the bits of its answers may depend on company, as
    those of all peers do."""
    return _one_replica("engine.batch_invariant=false", *settings)


def _one_replica(*settings: str) -> AbstractContextManager[Endpoint]:
    return sanderling("prefill.replicas=0", f"decode.threads={THREADS}", *settings)


def _requantised(slots: int, slot_tokens: int) -> AbstractContextManager[Endpoint]:
    return llama_cpp(environments.requantised("Q4_0"), slots, slot_tokens)


def _long() -> AbstractContextManager[Endpoint]:
    return llama_cpp(None, 1, CONTEXT_TOKENS)


def _distribution(name: str) -> str:
    return importlib.metadata.version(name)


OWN_VERSION = _distribution("sanderling")
REFERENCE = "engine.kernels=reference"
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("sanderling", "Q4_1", OWN_VERSION, _alone),
        Engine("sanderling-default", "Q4_1", OWN_VERSION, sanderling),
        Engine(
            "sanderling-reference",
            "Q4_1 read as float32",
            OWN_VERSION,
            lambda: _one_replica(REFERENCE),
        ),
        Engine("llama.cpp", "Q4_1", environments.LLAMA_CPP, llama_cpp),
        Engine(
            "llama.cpp-Q4_0",
            "Q4_0, requantised",
            environments.LLAMA_CPP,
            lambda: _requantised(SLOTS, SLOT_TOKENS),
        ),
        # A slot as long as the model's context is for one stream only.
        Engine("llama.cpp-long", "Q4_1", environments.LLAMA_CPP, _long),
        Engine(
            "llama.cpp-Q4_0-long",
            "Q4_0, requantised",
            environments.LLAMA_CPP,
            lambda: _requantised(1, CONTEXT_TOKENS),
        ),
        Engine("vLLM", "bfloat16", environments.VLLM, vllm),
        Engine("transformers", "float32", _distribution("transformers"), transformers),
    )
}
