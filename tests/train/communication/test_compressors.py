"""What every compressor has to be, one suite for all of them."""

from typing import Any

import pytest
import torch

from tests.train import tiny
from tests.train.communication.threads import ThreadTransport, ThreadWorld, on_threads
from train.communication.compressor import Compressor, Part, regrouped
from train.communication.exchange import build_compressor
from train.communication.transport import dense_bytes

PART = Part("p", ((48, 40), (64,), (30, 50)))
STEPS = 12
KINDS: dict[str, dict[str, Any]] = {
    "onebit": {},
    "powersgd": {"rank": 2},
    "dgc": {"ratio": 0.02},
    "qsgd": {"bits": 8},
}
DENSE: dict[str, dict[str, Any]] = {
    "onebit": {"warmup_steps": STEPS},
    "powersgd": {"rank": 48},
    "dgc": {"ratio": 1.0},
    "qsgd": {"warmup_steps": STEPS},
}
"""What makes each of them dense."""


def build(kind: str, warmup_steps: int = 0, beta1: float = 0.0, **settings: Any) -> Compressor:
    name = "sgd" if kind == "dgc" else "adamw"
    table = {"kind": kind, "warmup_steps": warmup_steps, **settings}
    job = tiny.job(compression=table, optimizer={"name": name, "beta1": beta1})
    compressor = build_compressor(job)
    assert compressor is not None
    return compressor


def gradient(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(PART.elements, generator=generator, dtype=torch.float64)


def run(world: ThreadWorld, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """STEPS sums on one rank, the exact ones beside them."""
    compressor, link = build(kind, **settings), ThreadTransport(world)
    found, exact = [], []
    for step in range(1, STEPS + 1):
        local = gradient(world.rank, step)
        given = local.clone()
        found.append(compressor.reduce(PART, local, link, step))
        assert torch.equal(local, given), "the gradient is the caller's"
        compressor.memory.commit()
        world.all_reduce(given)
        exact.append(given)
    return {
        "found": found,
        "exact": exact,
        "kept": compressor.memory.kept,
        "sent": link.sent_bytes / STEPS,
        "formula": compressor.formula_bytes(PART, world.size, 8),
        "values": compressor.memory_values(PART, world.size),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_same_bits(kind: str, size: int):
    ranks = on_threads(size, run, kind, KINDS[kind])
    for rank in ranks[1:]:
        for mine, other in zip(rank["found"], ranks[0]["found"], strict=True):
            assert torch.equal(mine, other)
    error = sum(ranks[0]["found"]) - sum(ranks[0]["exact"])
    assert float(error.norm()) > 1e-3, "nothing was compressed"


@pytest.mark.parametrize("kind", ["onebit", "powersgd", "dgc"])
def test_nothing_is_lost(kind: str):
    """All that came and all that is remembered is all that was given."""
    ranks = on_threads(3, run, kind, KINDS[kind])
    owed = torch.zeros(PART.elements, dtype=torch.float64)
    for rank in ranks:
        for name in ("error/p", "accumulated/p"):
            owed += rank["kept"].get(name, 0)
    servers = [rank["kept"]["server/p"] for rank in ranks if "server/p" in rank["kept"]]
    if servers:
        owed += torch.cat(servers)[: PART.elements]
    came, given = sum(ranks[0]["found"]), sum(ranks[0]["exact"])
    torch.testing.assert_close(came + owed, given, rtol=0, atol=1e-10)
    assert float(owed.norm()) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_dense_settings_are_dense(kind: str):
    for rank in on_threads(2, run, kind, DENSE[kind]):
        for mine, exact in zip(rank["found"], rank["exact"], strict=True):
            torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)
        assert rank["sent"] == dense_bytes(8 * PART.elements, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_nothing_is_compressed(kind: str):
    [rank] = on_threads(1, run, kind, KINDS[kind])
    for mine, exact in zip(rank["found"], rank["exact"], strict=True):
        assert torch.equal(mine, exact)
    assert rank["sent"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_formula(kind: str):
    """Exactly, but for QSGD, whose code depends on the values: these are normal."""
    [rank, _, _] = on_threads(3, run, kind, KINDS[kind])
    assert rank["sent"] == pytest.approx(rank["formula"], rel=0.03 if kind == "qsgd" else 0)
    assert rank["sent"] < 0.5 * dense_bytes(8 * PART.elements, 3)
    assert sum(tensor.numel() for tensor in rank["kept"].values()) == rank["values"]


def abandoned(world: ThreadWorld, kind: str, tries: int) -> list[torch.Tensor]:
    """Three sums, of which the second is tried `tries` times before it counts."""
    compressor, link = build(kind, **KINDS[kind]), ThreadTransport(world)
    found = []
    for step in (1, 2, 3):
        for _ in range(tries if step == 2 else 0):
            compressor.reduce(PART, gradient(world.rank, step + 50), link, step)
            compressor.memory.abandon()
        found.append(compressor.reduce(PART, gradient(world.rank, step), link, step))
        compressor.memory.commit()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_abandoned_step_leaves_no_trace(kind: str):
    once, twice = (on_threads(2, abandoned, kind, tries)[0] for tries in (0, 2))
    for mine, other in zip(once, twice, strict=True):
        assert torch.equal(mine, other)


def test_memory_of_other_ranks_is_shared_out():
    """What all of them owed stays owed: decisions' errors too; what is shared is kept."""
    ranks = {
        rank: {
            "error/p": torch.full((10,), rank + 1.0),
            "server/p": torch.full((8,), 10.0 * (rank + 1)),
            "factor/p/0": torch.ones(4),
        }
        for rank in range(2)
    }
    assert torch.equal(regrouped(ranks, 1, 2)["server/p"], ranks[1]["server/p"])
    merged = [regrouped(ranks, rank, 3) for rank in range(3)]
    owed = sum(rank["error/p"] for rank in merged)
    expected = torch.tensor([3.0 + 10] * 8 + [3.0 + 20] * 2)
    torch.testing.assert_close(owed, expected)
    assert all("server/p" not in rank for rank in merged)
    assert all(torch.equal(rank["factor/p/0"], torch.ones(4)) for rank in merged)
    assert regrouped({}, 0, 2) == {}
