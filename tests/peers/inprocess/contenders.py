"""Who is measured in process: our engine in all its modes, and every peer that runs this model on a
CPU, each on two threads of the same two cores. Called by tests/peers/inprocess/compare.py.

llama.cpp reads the .gguf file as it was published, and two requantised files for which it has
faster kernels; OpenVINO GenAI reads the same three. vLLM and transformers have the file's weights
as floats.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from cluster.settings import Settings
from models.resolve import resolve
from tests.peers.inprocess.children import Asked, LlamaCpp, child
from tests.peers.inprocess.protocol import THREADS
from tests.prove import environments

FORMS = ("Q4_1", "Q4_0", "Q8_0")
PUBLISHED = "Q4_1"
# together: with engine.batch_invariant = false
MODES = ("accurate", "fast", "accurate together", "fast together")
OURS = {mode: f"sanderling {mode}" for mode in MODES}
NEW_TOKENS = 64
SLOW_TOKENS = 24
SAME_FILE = f"llama.cpp {PUBLISHED}"


class Contender(NamedTuple):
    """An engine with its weights, how to start it for a while, how many tokens it is asked for
    (where fewer show its speed as well), and whether it is kept, so that warming it up helps."""

    name: str
    run: Callable[[], AbstractContextManager[Asked]]
    new_tokens: int = NEW_TOKENS
    kept: bool = True


def contenders() -> list[Contender]:
    """All of them, ours first."""
    made = [
        Contender(OURS[mode], _child_of(sys.executable, "sanderling", *mode.split()))
        for mode in MODES
    ]
    made += [Contender(f"llama.cpp {form}", _llama_cpp(form), kept=False) for form in FORMS]
    made += [Contender(f"OpenVINO {form}", _openvino(form)) for form in FORMS]
    made.append(Contender("vLLM bfloat16", _vllm))
    made += [
        Contender(f"transformers {dtype}", _transformers(dtype), SLOW_TOKENS)
        for dtype in ("bfloat16", "float32")
    ]
    return made


@contextlib.contextmanager
def two_cores() -> Iterator[None]:
    """This process, and with it all that it starts, on the first cores that it may use."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:THREADS])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def weights(form: str) -> Path:
    """The .gguf file of one of FORMS."""
    if form == PUBLISHED:
        return resolve(Settings().model)
    return environments.requantised(form)


def _child_of(
    python: str, engine: str, *arguments: str
) -> Callable[[], AbstractContextManager[Asked]]:
    command = [python, "-m", f"tests.peers.inprocess.run_{engine}", *arguments]
    return lambda: child(command, {})


def _llama_cpp(form: str) -> Callable[[], AbstractContextManager[Asked]]:
    def run() -> AbstractContextManager[Asked]:
        version = environments.LLAMA_CPP
        return contextlib.nullcontext(LlamaCpp(environments.llama_cpp(), weights(form), version))

    return run


def _openvino(form: str) -> Callable[[], AbstractContextManager[Asked]]:
    def run() -> AbstractContextManager[Asked]:
        python = environments.openvino() / "python"
        return _child_of(str(python), "openvino", str(weights(form)))()

    return run


def _vllm() -> AbstractContextManager[Asked]:
    programs, folder = environments.vllm(), environments.exported("bfloat16")
    module = "tests.peers.inprocess.run_vllm"
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:THREADS])
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine is stepped from outside
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
        "PATH": f"{programs}:{os.environ['PATH']}",  # where its compiler finds ninja
    }
    return child([str(programs / "python"), "-m", module, str(folder)], settings)


def _transformers(dtype: str) -> Callable[[], AbstractContextManager[Asked]]:
    def run() -> AbstractContextManager[Asked]:
        folder = environments.exported(dtype)
        return _child_of(sys.executable, "transformers", str(folder), dtype)()

    return run
