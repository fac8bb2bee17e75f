"""Bytes of a mesh by formula against what workers hold, keep for a backward pass, and send."""

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.train import tiny
from tests.train.parallel.zero_ranks import live_bytes, wire_bytes
from tests.train.processes import on_ranks
from train.data.stream import SampleStream
from train.job import Job
from train.parallel.mesh_cost import (
    Batch,
    MeshShape,
    activation_bytes,
    batch_of,
    matrices,
    sent_bytes,
    shape_of,
    state_bytes,
)
from train.parallel.mesh_job import MeshLearner
from train.parallel.mesh_moments import peak_bytes
from train.weights import read_start
from train.world import GlooWorld

RANKS = 4
MESHES: dict[str, dict[str, Any]] = {
    "dp x tp": {"tensor": 2},
    "dp x tp + sp": {"tensor": 2, "sequence_parallel": True},
    "ring x dp": {"sequence": 2},
    "ulysses x tp": {"tensor": 2, "sequence": 2, "sequence_kind": "ulysses"},
    "fsdp x tp": {"tensor": 2, "full_shard": True},
    "fsdp x ring": {"sequence": 2, "full_shard": True},
    "fsdp": {"full_shard": True},
    "ep x dp": {"expert": 2},
    "ep of four, weights travel": {"expert": 4, "expert_travel": "weights"},
    "ep x ring": {"expert": 2, "sequence": 2},
}
QUICK = ("dp x tp + sp", "ring x dp", "fsdp x tp", "ep x dp")
MIXTURE = {"experts": 4, "experts_per_token": 2, "feed_forward": 176}


def job_of(mesh: dict[str, Any], compute: str) -> Job:
    """Large enough that bytes of few numbers and of TCP's frames do not count."""
    shape = {"layers": 3, "hidden": 128, "heads": 8, "kv_heads": 4, "feed_forward": 352}
    return tiny.job(
        model=shape | (MIXTURE if "expert" in mesh else {}),
        data={"sequence_tokens": 128},
        run={"batch_tokens": 128 * 8, "micro_batch_tokens": 128 * 2, "tokens": 128 * 8},
        precision={"compute": compute},
        workers={"count": RANKS},
        mesh=mesh,
    )


def measured(world: GlooWorld, mesh: dict[str, Any], compute: str) -> dict[str, float]:
    """Of this worker: bytes that a step sends, of live tensors between two steps with the gradient
    there, of what one micro-batch keeps, and of tensors at their most in a step."""
    job = job_of(mesh, compute)
    tokens: Any = np.random.default_rng(7).integers(0, 255, 1 << 14).astype(np.uint16)
    stream = SampleStream(tokens, job.data.sequence_tokens, job.run.seed)
    before = live_bytes()
    learner = MeshLearner(job, read_start(job), stream)
    learner.enter(world)
    learner.step(world)
    gc.collect()
    held = live_bytes() - before
    world.barrier()
    begun = wire_bytes()
    learner.step(world)
    world.barrier()
    sent = wire_bytes() - begun
    learner.trainer.state.clear()  # with full_shard gradients are made anew
    begun_with = live_bytes() - before
    grew = []
    for _ in range(3):
        grew.append(grown(lambda: learner.step(world)))
        learner.trainer.state.clear()
    most = begun_with + min(grew)
    return {"held": held, "sent": sent, "kept": kept(learner, job), "peak": most}


def grown(act: Callable[[], object]) -> int:
    """By how many bytes memory that torch's allocator has given out grows at most, by its own
    record of each piece."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        act()
    record = told.profiler.kineto_results.events()
    pieces = [(each.start_ns(), each.nbytes()) for each in record if each.name() == "[memory]"]
    assert pieces, "nothing was recorded"
    pieces.sort(key=lambda piece: piece[0])
    most: int = max(accumulate(size for _, size in pieces))
    return most


def kept(learner: MeshLearner, job: Job) -> int:
    """Bytes of distinct storages that a forward pass saves, those of weights left out. FSDP frees a
    storage and keeps its object, so addresses come again."""
    model = learner.trainer.model
    found: dict[int, int] = {}
    weights: set[int] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
        base = tensor if tensor._base is None else tensor._base
        if base.is_leaf and base.requires_grad:
            weights.add(storage._cdata)
        return tensor

    batch = learner.stream.batch(0, job.micro_samples)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.loss(batch)
    total = sum(size for place, size in found.items() if place not in weights)
    loss.backward()  # all ranks let go of what they have put together
    return total


def expected(mesh: dict[str, Any], compute: str) -> dict[str, float]:
    job = job_of(mesh, compute)
    config, shape = read_start(job).config, shape_of(job)
    batch = batch_of(job, shape)
    return {
        "held": state_bytes(config, shape, compute).total,
        "sent": sent_bytes(config, shape, batch, compute).total,
        "kept": activation_bytes(config, shape, batch, compute),
        "peak": peak_bytes(config, shape, batch, compute),
    }


@pytest.mark.parametrize("compute", ["float64", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def test_workers_hold_keep_and_send_what_the_formulas_say(name: str, compute: str) -> None:
    answers = on_ranks(RANKS, measured, MESHES[name], compute)
    wanted = expected(MESHES[name], compute)
    for kind, near in (("held", 0.03), ("kept", 0.03), ("sent", 0.05), ("peak", 0.05)):
        # What another thread frees late counts as growth: of the peaks the least.
        told = [answer[kind] for answer in answers]
        found = min(told) if kind == "peak" else sum(told) / RANKS
        assert found == pytest.approx(wanted[kind], rel=near), kind


def test_a_mesh_of_one_is_the_whole_model() -> None:
    """By the table of ZeRO: 16 bytes a parameter in bfloat16, and 2 more as gradients are summed in
    float32; shared by four, a quarter of the 16."""
    config = read_start(job_of({}, "bfloat16")).config
    layer = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 352 + 2 * 128
    count = 272 * 128 + 3 * layer + 128
    assert matrices(config, 1).elements == count
    assert state_bytes(config, MeshShape(), "bfloat16").total == 18 * count
    shared = MeshShape(replicas=4, full_shard=True)
    assert state_bytes(config, shared, "bfloat16").total == 4 * count
    batch = Batch(samples=8, micro_samples=2, passes=4, sequence_tokens=128)
    assert sent_bytes(config, MeshShape(), batch, "bfloat16").total == 0
    data = sent_bytes(config, shared, batch, "bfloat16")
    assert data.total == data.data == 3 * 4 * 2 * count * 3 / 4


def test_each_axis_is_counted_apart() -> None:
    """By hand, in float32: a sum over two sends a tensor once; keys and values go round in two
    ranks once forward, once backward, and their gradients twice."""
    config = read_start(job_of({}, "float32")).config
    batch = Batch(samples=8, micro_samples=2, passes=4, sequence_tokens=128)
    two = sent_bytes(config, MeshShape(tensor=2), batch, "float32")
    assert (two.data, two.sequence) == (0, 0)
    assert two.tensor == (3 * 4 + 2) * 1024 * 128 * 4 + 3 * 1024 * 4
    ring = sent_bytes(config, MeshShape(sequence=2), batch, "float32")
    assert ring.tensor == ring.data == 0
    count = matrices(config, 1).elements
    assert ring.sequence == 3 * 512 * (2 * 64) * (2 + 2) * 4 + 4 * count
