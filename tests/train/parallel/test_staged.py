"""Stages under torch's schedules: gradients of one process, and the bubble that theory allows,
measured on stages that take equally long."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.train import tiny
from tests.train.processes import on_ranks
from train.parallel.staged import Part, Plan, Staged, ranges
from train.weights import build_model, read_start
from train.world import GlooWorld

SAMPLES, TOKENS = 8, 16
PLANS = {
    "gpipe": Plan("gpipe", 8),
    "1f1b": Plan("1f1b", 8),
    "interleaved": Plan("interleaved", 8, 2),
}


def made(tied: bool) -> Any:
    job = tiny.job(model={"layers": 4, "tied_head": tied})
    return build_model(job, read_start(job)).double()


def batch() -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).integers(0, 255, (SAMPLES, TOKENS + 1)))


def staged(world: GlooWorld, name: str, tied: bool) -> dict[str, Any]:
    """Loss and gradients of this rank's stages."""
    assert world.group is not None
    stages = Staged(made(tied), world.group, PLANS[name], 1 / (SAMPLES * TOKENS))
    loss = stages.gradients(batch())
    named = stages.parameters().items()
    return {"loss": loss, "grads": {n: p.grad.numpy() for n, p in named if p.grad is not None}}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_one_process(name: str, tied: bool) -> None:
    model = made(tied)
    loss = model.loss(batch()) / (SAMPLES * TOKENS)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    if tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    seen: set[str] = set()
    for answer in on_ranks(2, staged, name, tied):
        assert answer["loss"] == pytest.approx(float(loss.detach()), abs=1e-12)
        seen |= answer["grads"].keys()
        for parameter, grad in answer["grads"].items():
            np.testing.assert_allclose(grad, expected[parameter].numpy(), rtol=0, atol=1e-12)
    assert seen == expected.keys()


def twenty_steps(world: GlooWorld | None) -> list[float]:
    """Losses with AdamW: two pipelines of two ranks, each with half of the samples; or alone."""
    model, losses = made(True), []
    stages: Staged | None = None
    parameters = dict(model.named_parameters())
    if world is not None:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
        data, plan = grid.get_group("data"), Plan("1f1b", 4)
        stages = Staged(model, grid.get_group("pipeline"), plan, 1 / (SAMPLES * TOKENS))
        parameters = dict(stages.parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        if stages is None:
            loss = model.loss(batch()) / (SAMPLES * TOKENS)
            loss.backward()
            losses.append(float(loss.detach()))
        else:
            mine = batch().chunk(2)[data.rank()]
            nats = torch.tensor(stages.gradients(mine), dtype=torch.float64)
            for tensor in (nats, *(p.grad for p in parameters.values() if p.grad is not None)):
                dist.all_reduce(tensor, group=data)
            losses.append(float(nats))
        optimizer.step()
    return losses


def test_two_pipelines_equal_one_process_for_twenty_steps() -> None:
    """dp x pp, with a tied head on both ends."""
    expected = twenty_steps(None)
    assert expected[-1] < expected[0] / 2
    for losses in on_ranks(4, twenty_steps):
        assert losses == pytest.approx(expected, abs=1e-9)


class _Recorded(torch.autograd.Function):
    """Notes when a stage is computed, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, acts: list[tuple[str, int]], stage: int) -> Tensor:
        ctx.note = acts, stage
        acts.append(("forward", stage))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        acts, stage = ctx.note
        acts.append(("backward", stage))
        return grads[0], None, None


def acts_of(world: GlooWorld, name: str) -> list[tuple[str, int]]:
    """What this rank computed in a step, in its order."""
    assert world.group is not None
    stages = Staged(made(False), world.group, PLANS[name], 1.0)
    acts: list[tuple[str, int]] = []
    for number, part in stages.parts.items():
        record(part, acts, number)
    stages.gradients(batch())
    acts.clear()  # in its first step a stage is computed once more, for the shapes
    stages.gradients(batch())
    return acts


def record(part: Part, acts: list[tuple[str, int]], number: int) -> None:
    """Has a part's first layer note each pass."""
    layer: nn.Module = next(iter(part.layers.values()))
    way = layer.forward

    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out: Tensor = _Recorded.apply(way(x, cos, sin), acts, number)
        return out

    layer.forward = forward


COST = {"forward": 1.0, "backward": 2.0}


def makespan(orders: list[list[tuple[str, int]]], stages: int) -> float:
    """When the last act ends, if each rank keeps to its order and begins an act as soon as what it
    needs is there: the same micro-batch of the stage before, or behind."""
    ends: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * len(orders), [0] * len(orders)
    counted: list[list[tuple[str, int, int]]] = []
    for order in orders:
        met: dict[tuple[str, int], int] = {}
        counted.append([])
        for kind, stage in order:
            micro = met[kind, stage] = met.get((kind, stage), -1) + 1
            counted[-1].append((kind, stage, micro))
    while any(at[rank] < len(order) for rank, order in enumerate(counted)):
        moved = False
        for rank, numbered in enumerate(counted):
            while at[rank] < len(numbered):
                kind, stage, micro = numbered[at[rank]]
                needs = stage - 1 if kind == "forward" else stage + 1
                there = 0.0
                if 0 <= needs < stages:
                    if (kind, needs, micro) not in ends:
                        break
                    there = ends[kind, needs, micro]
                clock[rank] = max(clock[rank], there) + COST[kind]
                ends[kind, stage, micro] = clock[rank]
                at[rank], moved = at[rank] + 1, True
        assert moved, "the orders wait for each other"
    return max(clock)


@pytest.mark.parametrize("name", PLANS)
def test_the_bubble_is_what_theory_allows(name: str) -> None:
    """Of the order in which ranks really computed, on four of them; within a tenth."""
    plan, ranks = PLANS[name], 4 if PLANS[name].stages == 1 else 2
    orders = on_ranks(ranks, acts_of, name)
    busy = plan.stages * plan.micros * sum(COST.values())
    measured = 1 - busy / makespan(orders, ranks * plan.stages)
    assert measured == pytest.approx(plan.bubble(ranks), rel=0.10)


def test_an_order_of_one_by_one_is_all_bubble() -> None:
    """The mutation: each micro-batch forward and back before the next."""
    orders = [[("forward", rank), ("backward", rank)] * 8 for rank in range(4)]
    measured = 1 - 8 * sum(COST.values()) / makespan(orders, 4)
    assert measured == pytest.approx(3 / 4)


def test_interleaving_shrinks_the_bubble() -> None:
    bubbles = [plan.bubble(4) for plan in PLANS.values()]
    assert bubbles == pytest.approx([3 / 11, 3 / 11, 3 / 19])


def test_ranges_and_refusals() -> None:
    assert ranges(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    with pytest.raises(ValueError, match="interleaved wants 2 or more"):
        Plan("interleaved", 8).check(2, 4)
    with pytest.raises(ValueError, match="4 layers are fewer than 4 ranks x 2 stages; at most 1"):
        Plan("interleaved", 8, 2).check(4, 4)
    with pytest.raises(ValueError, match="in multiples of 2 ranks"):
        Plan("interleaved", 7, 2).check(2, 4)
