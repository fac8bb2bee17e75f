"""The integer kernels against their reference, bit for bit: on a GPU, or in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so the comparison (integer_twins.py)
runs in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.triton.conformance import conforms, every

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ROOT = Path(__file__).parents[3]
OPS = {
    *("requantise", "quantise", "linear", "softmax", "silu", "gelu", "gated", "rms_norm"),
    *("rotate", "attention"),
}
if DEVICE == "cpu":  # a GPU is the card that it is; the interpreter also stands in for a Turing
    OPS |= {"linear without matrix units", "attention without matrix units"}
LAUNCH = (
    "import torch; from kernels.triton import integer; integer.quantise(torch.ones(2, 2).int())"
)


def run(root: Path, *command: str, interpret: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": str(root)}
    return subprocess.run(
        # Off a GPU, where the versions are ours, a warning is a fault.
        [sys.executable, *(["-W", "error"] if DEVICE == "cpu" else []), *command],
        cwd=root,
        env=environment | {"DEVICE": DEVICE},
        capture_output=True,
        text=True,
        timeout=280,
    )


def compared(root: Path, begins: str = "") -> list[tuple[str, bool]]:
    """Runs the comparison with the packages under root."""
    done = run(
        root,
        "-m",
        "tests.kernels.triton.integer_twins",
        begins,
        interpret="1" if DEVICE == "cpu" else "0",
    )
    assert done.returncode == 0, done.stderr
    return [(op, equal) for op, equal in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("integer"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    """As the other ops: every access watched."""
    conforms(case, target, rows, dtype)


def test_kernels_have_the_bits_of_their_reference():
    made = compared(ROOT)
    assert {op for op, _ in made} == OPS
    assert [op for op, equal in made if not equal] == []


def test_other_bits_are_seen(tmp_path: Path):
    """Without the half that is added before a shift."""
    for package in ("kernels", "kernels/reference", "kernels/triton", "tests/kernels/triton"):
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "__init__.py").touch()
        pattern = "*integer*.py" if package.startswith("tests") else "*.[pj]*"
        for file in (ROOT / package).glob(pattern):
            text = file.read_text(encoding="utf-8")
            if file.name == "integer_kernels.py":
                text, count = re.subn(r"value \+ \(\(one << shift\) >> 1\)", "value", text)
                assert count == 1
            (tmp_path / package / file.name).write_text(text, encoding="utf-8")
    assert False in [equal for _, equal in compared(tmp_path, "r")]


def test_a_launch_without_a_gpu_says_what_is_missing():
    done = run(ROOT, "-c", LAUNCH, interpret="0")
    assert "integer_quantise in Triton needs its tensors on a CUDA or ROCm device" in done.stderr
