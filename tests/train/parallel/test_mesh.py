"""Training over a mesh against one process: losses, norms and weights of twenty steps, what crosses
between ranks, and what a layer keeps for its backward pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.train import tiny
from tests.train.processes import on_ranks
from train.data.stream import SampleStream
from train.model import Norm
from train.parallel.mesh import Mesh, build_mesh
from train.parallel.mesh_model import ExpertTable, MeshLlama
from train.parallel.mesh_state import whole_parameters
from train.parallel.mesh_trainer import MeshTrainer
from train.weights import build_model, read_start
from train.world import GlooWorld, LocalWorld, World

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


def followed(world: World, trainer: MeshTrainer) -> dict[str, Any]:
    """Losses and norms of its steps, and the whole model's weights after them."""
    reports = [trainer.step(world) for _ in range(STEPS)]
    weights = whole_parameters(trainer.state, trainer.model)
    return {
        "curve": [(report.loss, report.gradient_norm) for report in reports],
        "weights": {name: part.numpy() for name, part in weights},
    }


def trained(
    world: GlooWorld, shape: dict[str, int], more: dict[str, Any], full_shard: bool
) -> dict[str, Any]:
    """The job on this rank of a mesh."""
    start = read_start(JOB)
    mesh = build_mesh(world.size, **shape)
    model = MeshLlama(start.config, mesh, JOB.data.sequence_tokens, **more).double()
    model.load_whole(dict(build_model(JOB, start).double().named_parameters()))
    stream = SampleStream(tokens(), JOB.data.sequence_tokens, JOB.run.seed)
    return followed(world, MeshTrainer(JOB, model, stream, full_shard=full_shard))


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
    "fsdp": ({"data": 4}, {}),
    "fsdp x tp": ({"data": 2, "tensor": 2}, {}),
    "fsdp x ring": ({"data": 2, "sequence": 2}, {}),
    "fsdp x tp + sp": ({"data": 2, "tensor": 2}, SP),
}


QUICK = ("dp x tp + sp", "ring x dp", "fsdp x tp")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def test_equals_one_process_for_twenty_steps(name: str, alone: dict[str, Any]) -> None:
    shape, more = MESHES[name]
    for answer in on_ranks(4, trained, shape, more, "fsdp" in name):
        np.testing.assert_allclose(answer["curve"], alone["curve"], rtol=0, atol=1e-9)
        for parameter, made in answer["weights"].items():
            expected = alone["weights"][parameter]
            torch.testing.assert_close(torch.from_numpy(made), expected, rtol=0, atol=1e-9)


MIXTURE = ExpertTable(experts=4, top_k=2, balance=0.0)
"""Without the loss for balance, which is of each rank's own tokens."""


def mixture(world: GlooWorld | None, expert: int) -> dict[str, Any]:
    """The job with experts for feed-forwards, on this rank of a mesh, or alone."""
    config = read_start(JOB).config
    torch.manual_seed(11)
    source = MeshLlama(config, Mesh(), JOB.data.sequence_tokens, experts=MIXTURE).double()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    mesh = build_mesh(world.size, expert=expert) if world else Mesh()
    model = MeshLlama(config, mesh, JOB.data.sequence_tokens, experts=MIXTURE).double()
    model.load_whole(dict(source.named_parameters()))
    stream = SampleStream(tokens(), JOB.data.sequence_tokens, JOB.run.seed)
    return followed(world or LocalWorld(), MeshTrainer(JOB, model, stream))


@pytest.mark.parametrize("expert", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_experts_equal_one_process_for_twenty_steps(expert: int) -> None:
    """ep x dp: two ranks, or all four, share the experts; each has samples of its own."""
    expected = mixture(None, 1)
    for answer in on_ranks(4, mixture, expert):
        np.testing.assert_allclose(answer["curve"], expected["curve"], rtol=0, atol=1e-9)
        for name, made in answer["weights"].items():
            np.testing.assert_allclose(made, expected["weights"][name], rtol=0, atol=1e-9)


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


class Kept:
    """Bytes that autograd keeps for a backward pass, each storage once, weights apart."""

    def __init__(self, module: torch.nn.Module, *given: torch.Tensor) -> None:
        known = [*module.parameters(), *given]
        self._apart = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._storages: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept)

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._apart:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


BATCH, LENGTH = 3, 16


def layer_of(world: GlooWorld, sequence: bool) -> dict[str, Any]:
    """One layer, forward and backward: bytes kept in between, and collectives of each kind."""
    config = read_start(JOB).config
    mesh = build_mesh(world.size, tensor=world.size)
    made = MeshLlama(config, mesh, LENGTH, sequence_parallel=sequence).double()
    layer = made.model.layers[0]
    local = LENGTH // world.size if sequence else LENGTH
    x = torch.randn(BATCH, local, config.hidden, dtype=torch.float64, requires_grad=True)
    cos, sin = made.angles(torch.arange(LENGTH), torch.float64)
    kept = Kept(layer, cos, sin)
    with Calls() as made_calls:
        with kept.hooks:
            out = layer(x, cos, sin)
        forward = dict(made_calls.count)
        out.sum().backward()
    backward = {kind: count - forward[kind] for kind, count in made_calls.count.items()}
    return {"kept": kept.bytes, "forward": forward, "backward": backward}


def norm_bytes() -> int:
    """What a norm keeps of one token, its input and output included."""
    norm = Norm(JOB.model.hidden, 1e-5).double()
    x = torch.randn(1, 1, JOB.model.hidden, dtype=torch.float64, requires_grad=True)
    kept = Kept(norm)
    with kept.hooks:
        norm(x * 1.0).square().sum()
    return kept.bytes


def formula(ranks: int, sequence: bool) -> float:
    """Bytes of a layer for Korthikanti et al.'s equations 2 and 4, with this layer's constants.

    Whole on every rank, or shared with sequence parallelism: what the two norms keep. Shared by
    tensor ranks: joined queries, keys and values, queries and keys turned, the mix and a number per
    head; gates and ups, activated gates, their product.
    """
    config = read_start(JOB).config
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = 2 * query + key + (query + 2 * key) + config.heads
    split = 8 * (attention + 4 * config.ff)
    between = 2 * norm_bytes()
    return BATCH * LENGTH * (split / ranks + between / (ranks if sequence else 1))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_layer_keeps_what_the_formula_says(ranks: int, sequence: bool) -> None:
    """Within 3 %; and the formula without sequence parallelism does not fit what has it."""
    for answer in on_ranks(ranks, layer_of, sequence):
        assert answer["kept"] == pytest.approx(formula(ranks, sequence), rel=0.03)
        if ranks > 1:
            assert answer["kept"] != pytest.approx(formula(ranks, not sequence), rel=0.10)


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
    three = replace(Mesh().tensor, size=3)
    with pytest.raises(ValueError, match="3 ranks cannot share model.kv_heads = 4"):
        MeshLlama(config, Mesh(tensor=three), 16)
