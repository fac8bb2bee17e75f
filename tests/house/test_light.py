"""Parsing settings and printing help import neither torch nor Ray: both take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "fastapi")

LIGHT = {
    "settings": "from cluster.settings import resolve; resolve(environ={}).to_toml()",
    "help": "from cluster.cli import cli; cli(['--help'], standalone_mode=False)",
    "clock": "import cluster.clock",
    "registry": "import cluster.registry",
    "doctor": "from cluster.doctor.command import doctor",
    "train": "from train.commands import train",
    "compress": "from serve.compress_command import compress",
    "plan": "from autoscale.plan_command import plan",
    "autoscale": "from autoscale.providers.controller_command import autoscale",
}


def imported(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after running `code`."""
    report = f"{code}\nimport sys\nprint('LOADED', *sorted(set(sys.modules) & set({HEAVY!r})))"
    answer = subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("name", LIGHT)
def test_imports_nothing_heavy(name: str):
    assert imported(LIGHT[name]) == set()


def test_the_check_can_fail():
    assert imported("import fastapi") == {"fastapi"}
