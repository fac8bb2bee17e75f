"""Training over a mesh against one process: losses, norms and weights of twenty steps, what crosses
between ranks, and what a layer keeps for its backward pass."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.train import tiny
from tests.train.processes import on_ranks
from train.data.stream import SampleStream
from train.parallel.mesh import Mesh, build_mesh
from train.parallel.mesh_model import MeshLlama
from train.parallel.mesh_trainer import MeshTrainer
from train.weights import build_model, read_start
from train.world import GlooWorld, LocalWorld

STEPS = 20
JOB = tiny.job(
    model={"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4, "feed_forward": 48},
    run={"tokens": 16 * 12 * STEPS, "batch_tokens": 16 * 12, "micro_batch_tokens": 16 * 3},
)


def tokens() -> Any:
    """Ids that do not follow from anything."""
    return np.random.default_rng(7).integers(0, 255, 4096).astype(np.uint16)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The job in one process, by `train.step`."""
    trainer = tiny.trainer(JOB, tokens())
    reports = [trainer.step(LocalWorld()) for _ in range(STEPS)]
    weights = trainer.flat.named(trainer.flat.masters)
    return {
        "curve": [(report.loss, report.gradient_norm) for report in reports],
        "weights": {name: tensor.clone() for name, tensor in weights.items()},
    }


def trained(world: GlooWorld, shape: dict[str, int], more: dict[str, bool]) -> dict[str, Any]:
    """The job on this rank of a mesh."""
    start = read_start(JOB)
    mesh = build_mesh(world.size, **shape)
    model = MeshLlama(start.config, mesh, JOB.data.sequence_tokens, **more).double()
    model.load_whole(dict(build_model(JOB, start).double().named_parameters()))
    stream = SampleStream(tokens(), JOB.data.sequence_tokens, JOB.run.seed)
    trainer = MeshTrainer(JOB, model, stream)
    curve = [trainer.step() for _ in range(STEPS)]
    return {"curve": curve, "weights": {n: t.numpy() for n, t in trainer.whole().items()}}


SP = {"sequence_parallel": True}
MESHES = {
    "dp": ({"data": 4}, {}),
    "tp": ({"tensor": 4}, {}),
    "tp + sp": ({"tensor": 4}, SP),
    "dp x tp": ({"data": 2, "tensor": 2}, {}),
    "dp x tp + sp": ({"data": 2, "tensor": 2}, SP),
    "ring x dp": ({"data": 2, "sequence": 2}, {}),
    "ulysses x dp": ({"data": 2, "sequence": 2}, {"ring": False}),
    "ring x tp + sp": ({"sequence": 2, "tensor": 2}, SP),
}


@pytest.mark.parametrize("name", MESHES)
def test_equals_one_process_for_twenty_steps(name: str, alone: dict[str, Any]) -> None:
    shape, more = MESHES[name]
    for answer in on_ranks(4, trained, shape, more):
        np.testing.assert_allclose(answer["curve"], alone["curve"], rtol=0, atol=1e-9)
        for parameter, made in answer["weights"].items():
            expected = alone["weights"][parameter]
            torch.testing.assert_close(torch.from_numpy(made), expected, rtol=0, atol=1e-9)


class Calls:
    """Collectives by kind, counted where torch.distributed is called."""

    KINDS = ("all_reduce", "all_gather_single", "all_to_all_single")

    def __init__(self) -> None:
        self.count = dict.fromkeys(self.KINDS, 0)
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Calls":
        for kind in self.KINDS:
            self._patch.setattr(dist, kind, self._counted(kind, getattr(dist, kind)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _counted(self, kind: str, call: Any) -> Any:
        def counted(*args: Any, **more: Any) -> Any:
            self.count[kind] += 1
            return call(*args, **more)

        return counted


def layer_of(world: GlooWorld, sequence: bool) -> dict[str, Any]:
    """One layer, forward and backward: bytes kept in between, and collectives of each kind."""
    config = read_start(JOB).config
    mesh = build_mesh(world.size, tensor=world.size)
    made = MeshLlama(config, mesh, 16, sequence_parallel=sequence).double()
    layer, batch, count = made.model.layers[0], 3, 16
    local = count // world.size if sequence else count
    x = torch.randn(batch, local, config.hidden, dtype=torch.float64, requires_grad=True)
    cos, sin = made._turns(torch.arange(count), torch.float64)
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and tensor.dim() > 2 and tensor.requires_grad | (tensor.dim() > 2):
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with Calls() as made_calls:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = layer(x, cos, sin)
        forward = dict(made_calls.count)
        out.sum().backward()
    backward = {kind: count - forward[kind] for kind, count in made_calls.count.items()}
    return {"kept": sum(kept.values()), "forward": forward, "backward": backward}


def calls(*counts: int) -> dict[str, int]:
    """Sums, gathers, exchanges."""
    return dict(zip(Calls.KINDS, counts, strict=True))


def test_collectives_are_those_of_the_papers() -> None:
    """Megatron: two sums forward and two backward. With sequence parallelism two gathers and two
    scatters each way, and two gathers more for what was not kept."""
    for answer in on_ranks(2, layer_of, False):
        assert answer["forward"] == calls(2, 0, 0)
        assert answer["backward"] == answer["forward"]
    for answer in on_ranks(2, layer_of, True):
        assert answer["forward"] == calls(0, 2, 2)
        assert answer["backward"] == calls(0, 4, 2)


def test_refusals_name_the_setting() -> None:
    config = read_start(JOB).config
    with pytest.raises(ValueError, match="mesh.data x mesh.sequence x mesh.tensor = 1 x 3 x 1"):
        build_mesh(4, data=1, sequence=3)
    from dataclasses import replace

    three = replace(Mesh().tensor, size=3)
    with pytest.raises(ValueError, match="3 ranks cannot share model.kv_heads = 4"):
        MeshLlama(config, Mesh(tensor=three), 16)
