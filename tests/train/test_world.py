"""Worlds do what the protocol says, on one process and on three."""

import torch

from tests.train.processes import on_ranks
from train.world import GlooWorld, LocalWorld, World


def everything(world: World) -> dict[str, list[float] | int]:
    """One of each operation; what this rank ends up with."""
    mine = torch.tensor([1.0, 10.0 * world.rank])
    total = mine.clone()
    world.all_reduce(total)
    told = torch.tensor([float(world.rank)])
    world.broadcast(told, world.size - 1)
    gathered = [float(t[1]) for t in world.all_gather(mine)]
    passed = torch.tensor([-1.0])
    if world.size > 1:
        if world.rank == 0:
            world.send(torch.tensor([7.0]), 1)
        if world.rank == 1:
            world.recv(passed, 0)
    world.barrier()
    return {
        "rank": world.rank,
        "size": world.size,
        "sum": total.tolist(),
        "told": told.tolist(),
        "gathered": gathered,
        "passed": passed.tolist(),
    }


def test_a_world_of_one():
    found = everything(LocalWorld())
    assert found == {
        "rank": 0,
        "size": 1,
        "sum": [1.0, 0.0],
        "told": [0.0],
        "gathered": [0.0],
        "passed": [-1.0],
    }


def numbers(world: World) -> torch.Tensor:
    """10,001 numbers of this rank whose sum shows the order of addition."""
    return torch.randn(10_001, generator=torch.Generator().manual_seed(world.rank))


def with_bits(world: GlooWorld) -> tuple[dict[str, list[float] | int], bytes]:
    """One of each operation, and the bits of a sum."""
    total = numbers(world)
    world.all_reduce(total)
    return everything(world), total.numpy().tobytes()


def test_three_processes():
    """A sum has the same bits everywhere."""
    answers = on_ranks(3, with_bits)
    for rank, (found, bits) in enumerate(answers):
        assert found == {
            "rank": rank,
            "size": 3,
            "sum": [3.0, 30.0],
            "told": [2.0],
            "gathered": [0.0, 10.0, 20.0],
            "passed": [7.0] if rank == 1 else [-1.0],
        }
        assert bits == answers[0][1]
