"""Bytes as they are counted against bytes as the kernel counts them on TCP connections; gloo's
collectives against the threads' of the other tests; DDP hooks of every compressor."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.train.communication.test_compressors import DENSE, KINDS, build, gradient, run
from tests.train.communication.test_powersgd import Net
from tests.train.communication.threads import on_threads
from tests.train.parallel.zero_ranks import wire_bytes
from tests.train.processes import on_ranks
from train.communication.compressor import Part
from train.communication.hooks import DdpHook, compressed
from train.communication.transport import Transport
from train.world import GlooWorld

WIDE = Part("p", ((400, 500), (100, 1000)))
SIZE = 3
CALLS = {"none": 1, "onebit": 2, "powersgd": 2, "dgc": 1, "qsgd": 2}
"""Collectives of a step."""


def counted(world: GlooWorld, kind: str) -> tuple[int, int]:
    """Counted and sent, of three sums of a part of 2.4 MB."""
    link = Transport(world)
    compressor = None if kind == "none" else build(kind, **KINDS[kind])
    local = torch.randn(WIDE.elements, generator=torch.Generator().manual_seed(world.rank))
    world.barrier()
    begun = wire_bytes()
    for step in range(1, 4):
        if compressor is None:
            link.all_reduce(local.clone())
        else:
            compressor.reduce(WIDE, local, link, step)
            compressor.memory.commit()
    world.barrier()
    return link.sent_bytes, wire_bytes() - begun


def over_gloo(world: GlooWorld, kind: str) -> list[Any]:
    compressor, link = build(kind, **KINDS[kind]), Transport(world)
    found = []
    for step in (1, 2, 3):
        local = gradient(world.rank, step)
        part = Part("p", ((48, 40), (64,), (30, 50)))
        found.append(compressor.reduce(part, local, link, step).numpy())
        compressor.memory.commit()
    return found


def weights(world: GlooWorld, kind: str, settings: dict[str, Any]) -> list[Any]:
    """After four steps of DDP, with a hook or without."""
    model = Net()
    ddp = DistributedDataParallel(model)
    if kind != "none":
        ddp.register_comm_hook(DdpHook(build(kind, **settings), world), compressed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + world.rank)
        x = torch.randn(16, 40, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (ddp(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
    return [parameter.detach().numpy() for parameter in model.parameters()]


def everything(world: GlooWorld) -> dict[str, Any]:
    return {
        "counted": {kind: counted(world, kind) for kind in ("none", *KINDS)},
        "gloo": {kind: over_gloo(world, kind) for kind in KINDS},
        "plain": weights(world, "none", {}),
        "dense": {kind: weights(world, kind, DENSE[kind]) for kind in KINDS},
        "compressed": {kind: weights(world, kind, KINDS[kind]) for kind in KINDS},
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(SIZE, everything)


def test_counts_are_the_kernels(ranks: list[dict[str, Any]]):
    """Summed over ranks, which a collective may load unequally. Gloo's own messages come on top,
    as many bytes for each call whatever it carries: about 1,250 a rank for an all-reduce."""
    for kind in ranks[0]["counted"]:
        told = sum(rank["counted"][kind][0] for rank in ranks)
        sent = sum(rank["counted"][kind][1] for rank in ranks)
        own = 1400 * SIZE * 3 * CALLS[kind]
        assert told <= sent <= 1.02 * told + own, kind


@pytest.mark.parametrize("kind", KINDS)
def test_gloo_and_threads_agree(kind: str, ranks: list[dict[str, Any]]):
    expected = on_threads(SIZE, run, kind, KINDS[kind])[0]["found"]
    for rank in ranks:
        for mine, other in zip(rank["gloo"][kind], expected, strict=False):
            np.testing.assert_allclose(mine, other.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_at_dense_settings_is_ddp(kind: str, ranks: list[dict[str, Any]]):
    for rank in ranks:
        for mine, plain in zip(rank["dense"][kind], rank["plain"], strict=True):
            np.testing.assert_allclose(mine, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_keeps_replicas_equal(kind: str, ranks: list[dict[str, Any]]):
    for rank in ranks:
        pairs = zip(rank["compressed"][kind], ranks[0]["compressed"][kind], strict=True)
        assert all((mine == other).all() for mine, other in pairs)
    moved = zip(ranks[0]["compressed"][kind], ranks[0]["plain"], strict=True)
    assert max(float(abs(a - b).max()) for a, b in moved) > 1e-5
