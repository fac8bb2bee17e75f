"""How the CPU kernels are compiled: nothing shared between instruction sets, and clear refusals."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels.cpu import build

COMPILER = shutil.which("g++") or shutil.which("c++")


def test_an_unknown_machine_gets_plain_cpp():
    assert [isa.name for isa in build.instruction_sets("riscv64")] == ["portable"]
    assert [isa.name for isa in build.instruction_sets("x86_64")][-1] == "portable"


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
