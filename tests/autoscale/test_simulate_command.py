"""`sanderling simulate`: its table, its files, and what it refuses."""

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoscale.simulate_command import simulate
from cluster.cli import cli

SHORT = ("--days", "2", "--target", "0.9")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(simulate, [*SHORT, *arguments])


def test_table_log_and_picture(tmp_path: Path):
    log, picture = tmp_path / "log.csv", tmp_path / "course.png"
    result = run("--log", str(log), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    for name in ("mixed", "spothedge", "even_spread", "single", "on_demand", "all-knowing"):
        assert name in result.output
    rows = list(csv.DictReader(log.open(encoding="utf-8")))
    assert {row["act"] for row in rows} <= {"launch", "refused", "terminate"}
    assert all(row["reason"] for row in rows)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_trace_of_ones_own(tmp_path: Path):
    for zone in ("e1a", "e2a"):
        body = f'{{"metadata": {{"gap_seconds": 300}}, "data": {[1] * 40 + [0] * 10 + [1] * 50}}}'
        (tmp_path / f"{zone}_v100_1.json").write_text(body, encoding="utf-8")
    result = run("--trace", str(tmp_path), "--need", "2")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "best"), "known are mixed"),
        (("--fit", "0.001"), "at least 2 steps"),
    ],
)
def test_what_it_refuses_it_explains(arguments: tuple[str, ...], said: str):
    result = run(*arguments)
    assert isinstance(result.exception, ValueError)
    assert said in str(result.exception)


def test_an_empty_folder_is_named(tmp_path: Path):
    result = run("--trace", str(tmp_path))
    assert str(tmp_path) in str(result.exception)


def test_the_command_line_knows_it():
    assert "simulate" in CliRunner().invoke(cli, ["--help"]).output
