"""`sanderling compress`: the figures it prints, and that they are those of the file it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cluster.settings import Settings
from models.resolve import resolve
from serve.compress_command import compress
from serve.eval_command import evaluate
from tests.models.tiny import write_byte_level

SMALL = ("--windows", "2", "--window-tokens", "24")


def run(model: Path | str, out: Path, kind: str, *flags: str) -> Result:
    wanted = [str(model), "--out", str(out), "--weights", kind, *flags]
    settings = ["--set", f"data_dir={out.parent / 'data'}"]
    return CliRunner().invoke(compress, [*wanted, *settings])


def figures(model: Path | str, out: Path, kind: str, *flags: str) -> dict[str, Any]:
    done = run(model, out, kind, "--json", *flags)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_figures_are_those_of_the_files(tmp_path: Path):
    model = write_byte_level(tmp_path / "tiny.gguf")
    report = figures(model, tmp_path / "out", "q4_0", *SMALL)
    made = tmp_path / "out" / "tiny-q4_0.gguf"
    assert report["after"]["file"] == str(made) and report["after"]["weights"] == "Q4_0"
    for side, path in (("before", model), ("after", made)):
        assert report[side]["bytes"] == path.stat().st_size
        flags = ["ppl", *SMALL, "--json", "--set", f"model={path}"]
        asked = CliRunner().invoke(evaluate, [*flags, "--set", f"data_dir={tmp_path / 'data'}"])
        assert report[side]["perplexity"] == json.loads(asked.stdout)["perplexity"]
    assert report["bytes_ratio"] < 1 and 0 < report["weights_error"] < 0.2
    assert report["perplexity_ratio"] != 1


def test_the_same_again_costs_nothing(tmp_path: Path):
    """Identity: all matrices in float32 are the numbers that the file's blocks stand for."""
    model = write_byte_level(tmp_path / "tiny.gguf")
    exact = ("--set", "engine.kernels=reference")
    report = figures(model, tmp_path / "out", "f32", *SMALL, *exact)
    assert report["perplexity_ratio"] == 1 and report["weights_error"] == 0
    again = figures(report["after"]["file"], tmp_path / "out", "f32", *SMALL, *exact)
    assert again["bytes_ratio"] == 1


def test_a_person_sees_a_table_and_what_to_do_next(tmp_path: Path):
    model = write_byte_level(tmp_path / "tiny.gguf")
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 50)
    done = run(model, tmp_path / "out", "q8_0", "--text", str(text), *SMALL)
    assert done.exit_code == 0, done.output
    for word in ("bytes", "perplexity", "error of weights", "46 tokens", "sanderling up --model"):
        assert word in done.output


@pytest.mark.parametrize(
    "kind, flags, said",
    [
        ("q3_x", (), "weight format 'q3_x' is not known; accepted are"),
        ("q8_0", ("--windows", "9999"), "the text has"),
    ],
)
def test_refusals_are_sentences_and_leave_nothing(
    tmp_path: Path, kind: str, flags: tuple[str, ...], said: str
):
    model = write_byte_level(tmp_path / "tiny.gguf")
    done = run(model, tmp_path / "out", kind, *flags)
    assert isinstance(done.exception, ValueError) and said in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_default_model_in_eight_bits(tmp_path: Path):
    """Rounding what Q4_1 stands for to 8 bits costs next to nothing in quality."""
    try:
        path = resolve(Settings().model)
    except ValueError as error:
        pytest.skip(str(error))
    report = figures(path, tmp_path / "out", "q8_0", "--windows", "1", "--window-tokens", "256")
    assert report["after"]["kernels"] == "cpu"
    assert report["perplexity_ratio"] == pytest.approx(1, abs=5e-3)
    assert 1.3 < report["bytes_ratio"] < 2.2
