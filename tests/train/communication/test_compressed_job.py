"""Compression as a job's file switches it on: refusals, what is printed, and going on from a
checkpoint."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.train import tiny
from tests.train.communication.threads import ThreadTransport, ThreadWorld, on_threads
from train.checkpoint.local import LocalStorage
from train.checkpoint.states import StoredCheckpoints
from train.commands import begin, refuse_changes
from train.communication.exchange import Exchange
from train.data.corpus import open_corpus
from train.estimate import estimate
from train.folder import RunFolder, Status
from train.layout import FlatModel
from train.precision import COMPUTE
from train.view import console_of_nobody, estimate_table, line, status_table
from train.weights import build_model, read_start

STEPS = 8
HALF = 4
TABLES: dict[str, dict[str, Any]] = {
    "onebit": {"compression": {"kind": "onebit", "warmup_steps": 2}},
    "powersgd": {"compression": {"kind": "powersgd", "warmup_steps": 2}},
    "dgc": {
        "compression": {"kind": "dgc", "ratio": 0.05, "warmup_steps": 2},
        "optimizer": {"name": "sgd", "learning_rate": 0.3},
    },
    "qsgd": {"compression": {"kind": "qsgd", "warmup_steps": 2}},
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("corpus")
    tiny.corpus(path)
    return open_corpus(path).train


def go(
    world: ThreadWorld, kind: str, tokens: Any, folder: Path, steps: int, forget: bool
) -> list[float]:
    """Losses of the next steps of a run, from its newest checkpoint, which is then made anew.
    forget: what compression still owed is not read."""
    training = tiny.trainer(tiny.job(**TABLES[kind]), tokens)
    training.exchange.transport = ThreadTransport
    store = StoredCheckpoints(LocalStorage(folder))
    state = store.newest()
    if state is not None:
        if forget:
            state.ranks = {}
        training.load(state)
    losses = [training.step(world).loss for _ in range(steps)]
    store.save(training.state(), world)
    return losses


@pytest.mark.parametrize("kind", TABLES)
def test_a_run_goes_on_to_the_bit(kind: str, tokens: Any, tmp_path: Path):
    """Stopped in the middle, started again on as many workers; without its memory it does not."""
    whole = on_threads(2, go, kind, tokens, tmp_path / "whole", STEPS, False)[0]
    first = on_threads(2, go, kind, tokens, tmp_path / "cut", HALF, False)[0]
    second = on_threads(2, go, kind, tokens, tmp_path / "cut", HALF, False)[0]
    assert first + second == whole
    if kind == "qsgd":
        return  # it owes nothing
    on_threads(2, go, kind, tokens, tmp_path / "torn", HALF, False)
    torn = on_threads(2, go, kind, tokens, tmp_path / "torn", HALF, True)[0]
    assert torn != second


@pytest.mark.parametrize("kind", TABLES)
def test_a_run_goes_on_with_another_number_of_workers(kind: str, tokens: Any, tmp_path: Path):
    first = on_threads(3, go, kind, tokens, tmp_path, HALF, False)[0]
    second = on_threads(2, go, kind, tokens, tmp_path, HALF, False)[0]
    assert second[-1] < first[0]


def test_a_checkpoint_of_other_buckets_is_refused(tokens: Any, tmp_path: Path):
    on_threads(2, go, "powersgd", tokens, tmp_path, HALF, False)
    tables = TABLES["powersgd"] | {"communication": {"overlap": True, "bucket_bytes": 4096}}
    training = tiny.trainer(tiny.job(**tables), tokens)
    state = StoredCheckpoints(LocalStorage(tmp_path)).newest()
    assert state is not None
    training.load(state)
    with pytest.raises(ValueError, match="communication.bucket_bytes"):
        on_threads(2, lambda world: training.exchange.begin(world, 1))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another's setting": (
        {"compression": {"kind": "qsgd", "rank": 4}},
        'rank = 4 is read where kind = "powersgd"',
    ),
    "1-bit Adafactor": (
        {"compression": {"kind": "onebit"}, "optimizer": {"name": "adafactor"}},
        'optimizer.name = "adamw", but',
    ),
    "DGC's Adam": ({"compression": {"kind": "dgc"}}, 'optimizer.name = "sgd", but'),
    "clipped early": (
        {"compression": {"kind": "onebit"}, "communication": {"overlap": True}},
        "needs optimizer.clip_norm = 0",
    ),
    "an unknown kind": ({"compression": {"kind": "zip"}}, "kind"),
    "too many bits": ({"compression": {"kind": "qsgd", "bits": 9}}, "bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name: str):
    tables, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        tiny.job(**tables)


def test_a_run_cannot_change_its_compression():
    old, new = tiny.job(), tiny.job(compression={"kind": "qsgd"})
    with pytest.raises(ValueError, match="compression.kind was 'none'"):
        refuse_changes(old, new)


def printed(table: Any) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.usefixtures("unrehearsed")
def test_the_dry_run_says_the_formula():
    """And the formula is the exchange's, which other tests compare with counted bytes."""
    for kind, tables in TABLES.items():
        wanted = tiny.job(**tables, workers={"count": 2})
        flat = FlatModel(build_model(wanted, read_start(wanted)), COMPUTE["float64"])
        share = flat.summed.nbytes / Exchange(wanted, flat).formula_bytes(2)
        told = printed(estimate_table(wanted, estimate(wanted)))
        assert f"1/{share:.1f} of dense after 2 steps of warm-up" in told, kind


def test_the_status_shows_what_was_measured(tmp_path: Path):
    folder = RunFolder(tmp_path / "t")
    texts = tiny.write_texts(tmp_path / "texts")
    job = tiny.job(name="t", folder=tmp_path, data={"sources": (str(texts),)})
    begin(job, folder, console_of_nobody())
    status = Status("stopped", 3, 6, sent_bytes=1 << 20, dense_bytes=20 << 20)
    folder.write_status(status)
    assert "1.000 MiB per worker and step, 1/20.0 of dense, measured" in printed(
        status_table(folder)
    )
    assert "sent 1/20.0 of dense" in line(status)
    assert "of dense" not in line(Status("stopped", sent_bytes=5, dense_bytes=5))
