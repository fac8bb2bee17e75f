"""ZeRO's table (bytes kept, bytes sent), and its updates against one process's AdamW."""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.train.parallel.zero_ranks import DECAY, build, measured
from tests.train.processes import on_ranks
from train.parallel.collectives import added
from train.parallel.zero import shard
from train.world import LocalWorld

BYTES = {
    1: lambda size: 4 + 12 / size,
    2: lambda size: 2 + 14 / size,
    3: lambda size: 16 / size,
}
SENT = {1: 2.0, 2: 2.0, 3: 3.0}


class Found(NamedTuple):
    """What every rank of a world of this size measured."""

    size: int
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Found:
    folder: Path = tmp_path_factory.mktemp("zero")
    return Found(request.param, on_ranks(request.param, measured, str(folder)))


def test_live_bytes_are_the_tables(found: Found):
    for rank in found.ranks:
        for stage, wanted in BYTES.items():
            live = rank["sizes"][stage]["live"]
            assert live == pytest.approx(wanted(found.size), rel=0.02), stage


def test_no_stage_is_taken_for_another():
    """The bound of 2 % tells them apart: what one stage shares less would be seen."""
    ordered = sorted(wanted(4) for wanted in BYTES.values())
    assert all(high / low > 1.2 for low, high in pairwise(ordered))


def test_stage_three_sends_half_more(found: Found):
    """As the kernel counts bytes on TCP connections. Gloo's own reduce-scatter sends twice ours."""
    for stage, wanted in SENT.items():
        sent = [rank["sizes"][stage]["sent"] for rank in found.ranks]
        assert sum(sent) / found.size == pytest.approx(wanted, rel=0.02), (stage, sent)


def test_twenty_steps_are_adams(found: Found):
    for rank in found.ranks:
        assert rank["equal"].keys() == {1, 2, 3}
        assert max(rank["equal"].values()) < 1e-12


def test_saved_by_all_and_loaded_by_one_fewer(found: Found):
    for rank in found.ranks[:-1]:
        assert rank["moved"].keys() == {1, 2, 3}
        assert max(rank["moved"].values()) < 1e-12


def test_alone_there_is_nothing_to_share():
    """A world of one: stages 1 to 3 are all one process's AdamW."""
    for stage in (1, 2, 3):
        model = build(6, 1, torch.float64)
        sharded = shard(model, LocalWorld(), stage, "float64", DECAY)
        wanted = build(6, 1, torch.float64)
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in wanted.parameters() if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in wanted.parameters() if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=0.01,
            betas=(0.9, 0.95),
        )
        for step in range(3):
            x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6) + step
            sharded.clear_gradient()
            model(x).square().sum().backward()
            sharded.reduce()
            sharded.update(step + 1, 0.01)
            optimizer.zero_grad()
            wanted(x).square().sum().backward()
            optimizer.step()
        for mine, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-14)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="sharding.stage = 4: accepted are 1, 2 and 3"):
        shard(build(4, 1, torch.float32), LocalWorld(), 4, "float32", DECAY)

    class Ungrouped(LocalWorld):
        size = 2

    with pytest.raises(ValueError, match="sharding.stage = 1 needs workers with a process group"):
        shard(build(4, 1, torch.float32), Ungrouped(), 1, "float32", DECAY)


def test_shares_are_added_in_the_order_of_ranks():
    shares = torch.tensor([[1e8], [1.0], [-1e8], [1.0]], dtype=torch.float32)
    assert float(added(shares)) == 1.0  # in float32, 1e8 + 1 is 1e8
    half = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert float(added(half)) == 258.0  # in bfloat16 steps it would stay 256
