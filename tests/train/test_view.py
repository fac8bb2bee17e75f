"""What a person sees of a run, and what an existing model knew before its first step."""

import io
import math
from pathlib import Path

import matplotlib.image
import pytest
import torch
from rich.console import Console
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.train.test_run import job, make
from train.folder import RunFolder, Status
from train.view import Progress, plot, status_table
from train.world import LocalWorld


def test_an_existing_model_is_measured_before_its_first_step(tmp_path: Path):
    """As transformers measures it; a fresh one knows nothing."""
    first = make(job(tmp_path, "first"))
    first.run(LocalWorld())
    assert [line["step"] for line in held_out(first.folder)] == [6]
    tables = {"model": {"start_from": str(first.folder.path)}}
    second = make(job(tmp_path, "second", **tables))
    second.run(LocalWorld())
    before, after = held_out(second.folder)
    assert (before["step"], before["tokens"], after["step"]) == (0, 0, 6)
    peer = AutoModelForCausalLM.from_pretrained(first.folder.path, dtype=torch.float64)
    rows = torch.from_numpy(second.corpus.held_out[:161].astype("int64")).unfold(0, 17, 16)
    with torch.no_grad():
        logits = peer(rows[:, :-1]).logits
    nats = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    per_byte = (len(second.corpus.held_out) - 1) / second.corpus.held_out_bytes
    assert before["bits_per_byte"] == pytest.approx(float(nats) / math.log(2) * per_byte, rel=1e-6)
    again = make(job(tmp_path, "second", **tables))
    again.run(LocalWorld())
    assert len(held_out(second.folder)) == 2 + 1  # the end's, once more; not the beginning's


def held_out(folder: RunFolder) -> list[dict[str, float]]:
    return [line for line in folder.read_metrics() if "bits_per_byte" in line]


def test_a_step_is_told_of_once_where_there_is_no_terminal(tmp_path: Path):
    folder, out = RunFolder(tmp_path), io.StringIO()
    with folder.locked(), Progress(folder, Console(file=out, width=12)) as progress:
        for now_s, step in ((0, 1), (60, 1), (120, 2), (121, 3), (180, 3)):
            folder.write_status(Status("training", step=step, steps=9, tokens=step * 8))
            progress.update(now_s)
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == [
        "step 1/9",
        "step 2/9",
        "step 3/9",
    ]


def test_the_status_names_no_price_where_there_is_none(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for usd, shown in ((0.0, False), (0.5, True)):
        folder.write_status(Status("finished", step=9, steps=9, trained_s=61, usd=usd))
        out = io.StringIO()
        Console(file=out, width=200).print(status_table(folder))
        assert "1 min 01 s" in out.getvalue() and ("$" in out.getvalue()) == shown


def test_the_plot_has_both_curves(tmp_path: Path):
    """Held-out points are orange, and not there without an evaluation."""
    folder = RunFolder(tmp_path)
    for step in range(1, 5):
        folder.append_metrics({"step": step, "tokens": step * 8, "loss": 5 / step})
    orange = []
    for _ in range(2):
        assert plot(folder, folder.plot)
        pixels = matplotlib.image.imread(folder.plot)[..., :3]
        orange.append(int((abs(pixels - (1, 0.498, 0.055)).max(-1) < 0.1).sum()))
        folder.append_metrics({"step": 4, "tokens": 32, "bits_per_byte": 2.5})
    assert orange[0] == 0 < orange[1]
