"""How the CPU kernels are compiled: nothing shared between instruction sets, the same bits on
another architecture, and clear refusals."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels.cpu import build

COMPILER = shutil.which("g++") or shutil.which("c++")
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static")
PORTABLE = build.instruction_sets("x86_64")[-1]


def test_an_unknown_machine_gets_plain_cpp():
    assert [isa.name for isa in build.instruction_sets("riscv64")] == ["portable"]
    for machine in ("x86_64", "aarch64"):
        assert build.instruction_sets(machine)[-1].name == "portable"


@pytest.mark.parametrize("isa", build.instruction_sets("x86_64")[:1], ids=lambda isa: isa.name)
def test_an_object_of_one_instruction_set_shares_no_code_with_the_others(isa, tmp_path: Path):
    """What a header instantiates is kept once for the whole library: perhaps with instructions that
    an older machine has not."""
    assert COMPILER is not None
    output = tmp_path / "isa.o"
    subprocess.run(build.compile_isa(COMPILER, isa, output), check=True)
    listed = subprocess.run(
        ["nm", "--defined-only", "--extern-only", "--demangle", str(output)],
        capture_output=True,
        text=True,
        check=True,
    )
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    code = [name for kind, name in symbols if kind in "TW"]  # W: kept once, T: ours
    assert code == [f"sanderling::table_{isa.name}()"]


def same_bits(
    compiler: str, isa: build.InstructionSet, folder: Path, more: tuple[str, ...]
) -> Path:
    """The program that prints a digest of what an instruction set computes; more: flags."""
    program = folder / f"{Path(compiler).name}-{isa.name}"
    kernels = program.with_suffix(".o")
    subprocess.run([*build.compile_isa(compiler, isa, kernels), *more], check=True)
    sources = [str(Path(__file__).parent / "same_bits.cpp"), str(build.SOURCES / "pool.cpp")]
    flags = ["-std=c++17", "-O1", f"-I{build.SOURCES}", f"-DNAMED=table_{isa.name}"]
    linked = [compiler, *flags, *sources, str(kernels), "-static", "-pthread", "-o", str(program)]
    subprocess.run(linked, check=True)
    return program


def printed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(
    CROSS_COMPILER is None,
    reason="aarch64-linux-gnu-g++ is not here (Debian: g++-aarch64-linux-gnu)",
)
@pytest.mark.parametrize(
    "names,more",
    [
        (("dotprod",), ("-O1",)),  # quicker to compile, and the same by the rules of cpu/src
        pytest.param(("dotprod", "neon", "portable"), (), marks=pytest.mark.slow),
    ],
)
def test_an_arm_processor_gets_the_same_bits(names, more, tmp_path: Path):
    assert CROSS_COMPILER is not None and COMPILER is not None
    isas = [isa for isa in build.instruction_sets("aarch64") if isa.name in names]
    programs = [same_bits(CROSS_COMPILER, isa, tmp_path, more) for isa in isas]
    if EMULATOR is None:
        pytest.skip("compiled, but qemu-aarch64-static is not here (Debian: qemu-user-static)")
    wanted = printed(same_bits(COMPILER, PORTABLE, tmp_path, ("-O1",)))
    assert "not finite" not in wanted and len(wanted.splitlines()) == 32
    for program in programs:
        assert printed(EMULATOR, program) == wanted, program.name


def test_a_machine_without_a_compiler_is_told(monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.main() == 1
    assert "install g++ or give CXX=" in capsys.readouterr().err


def test_a_compiler_that_fails_says_why_and_leaves_what_was_there(monkeypatch, capsys, tmp_path):
    library = tmp_path / "native.so"
    library.write_text("before")
    monkeypatch.setattr(build, "LIBRARY", library)
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    assert build.main() == 1
    assert "could not be compiled" in capsys.readouterr().err
    assert library.read_text() == "before"
