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


def test_three_processes():
    for rank, found in enumerate(on_ranks(3, everything)):
        assert found == {
            "rank": rank,
            "size": 3,
            "sum": [3.0, 30.0],
            "told": [2.0],
            "gathered": [0.0, 10.0, 20.0],
            "passed": [7.0] if rank == 1 else [-1.0],
        }


def same_bits(world: GlooWorld) -> bytes:
    """The sum of numbers whose order of addition shows."""
    generator = torch.Generator().manual_seed(world.rank)
    numbers = torch.randn(10_001, generator=generator)
    world.all_reduce(numbers)
    return numbers.numpy().tobytes()


def test_a_sum_has_the_same_bits_everywhere():
    results = on_ranks(3, same_bits)
    assert results[0] == results[1] == results[2]
