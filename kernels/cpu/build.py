"""Compiles the CPU kernels: `python -m kernels.cpu.build`, called by `make install`.

One object for each instruction set, from the same source, and one library that picks among them
when it runs; so what is built here also runs on an older machine of the same architecture. Needs
g++ (or what CXX names) and torch's headers, and nothing of setuptools.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "src"
LIBRARY = FOLDER / "native.so"
COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
# A contraction would round once where another instruction set rounds twice.
EXACT = ("-ffp-contract=off",)


class InstructionSet(NamedTuple):
    """A name and the flags under which isa.cpp is compiled for it."""

    name: str
    flags: tuple[str, ...] = ()


AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
INSTRUCTION_SETS = {
    "x86_64": (
        InstructionSet("amx", (*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8", "-mamx-bf16")),
        InstructionSet("vnni", (*AVX512, "-mavx512vnni")),
        InstructionSet("avx512", AVX512),
        InstructionSet("avx2", AVX2),
        InstructionSet("portable"),
    ),
    "aarch64": (
        InstructionSet("dotprod", ("-march=armv8.2-a+dotprod",)),
        InstructionSet("neon"),  # which every such machine has
        InstructionSet("portable", ("-DSANDERLING_PLAIN",)),
    ),
}


def instruction_sets(machine: str) -> tuple[InstructionSet, ...]:
    """What is compiled for a machine, the best first; plain C++ where nothing better is known."""
    return INSTRUCTION_SETS.get(machine, (InstructionSet("portable"),))


def compile_isa(compiler: str, isa: InstructionSet, output: Path) -> list[str]:
    """The command that compiles the kernels for one instruction set."""
    flags = [*COMMON, *EXACT, *isa.flags, f"-DSANDERLING_ISA={isa.name}"]
    return [compiler, *flags, "-c", str(SOURCES / "isa.cpp"), "-o", str(output)]


def compile_host(compiler: str, source: str, output: Path) -> list[str]:
    """The command that compiles a file which runs everywhere."""
    import torch
    from torch.utils.cpp_extension import include_paths

    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = [word for path in include_paths() for word in ("-isystem", path)]
    return [compiler, *COMMON, abi, *includes, "-c", str(SOURCES / source), "-o", str(output)]


def link(compiler: str, objects: list[Path], output: Path) -> list[str]:
    """The command that makes the library; torch is in the process that loads it."""
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    wanted = [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}", "-pthread"]
    return [compiler, "-shared", *map(str, objects), *wanted, "-o", str(output)]


def build(compiler: str, folder: Path, output: Path) -> tuple[InstructionSet, ...]:
    """Compiles everything in `folder` and puts the library at `output`, whole or not at all."""
    made = instruction_sets(platform.machine())
    jobs = [
        compile_host(compiler, name, folder / f"{name}.o")
        for name in ("ops.cpp", "pack.cpp", "pool.cpp")
    ]
    jobs += [compile_isa(compiler, isa, folder / f"{isa.name}.o") for isa in made]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, jobs))
    staged = folder / output.name
    _run(link(compiler, [Path(job[-1]) for job in jobs], staged))
    shutil.copy(staged, output.with_suffix(".new"))
    output.with_suffix(".new").replace(output)
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def main() -> int:
    """Build for this machine; says what was built, or why it could not be."""
    import tempfile

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        print(
            "no C++ compiler was found; install g++ or give CXX=/path/to/compiler", file=sys.stderr
        )
        return 1
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = build(compiler, Path(folder), LIBRARY)
        except RuntimeError as error:
            print(f"the CPU kernels could not be compiled: {error}", file=sys.stderr)
            return 1
    names = ", ".join(isa.name for isa in made)
    print(f"==> CPU kernels for {names}: compiled in {time.monotonic() - started_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
