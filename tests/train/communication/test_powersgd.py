"""PowerSGD against torch's own hook, against the paper's table, and against exact projections."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as theirs
from torch.nn.parallel import DistributedDataParallel

from tests.train.communication.threads import ThreadTransport, ThreadWorld, on_threads
from tests.train.processes import on_ranks
from train.communication.compressor import Part
from train.communication.hooks import DdpHook, compressed
from train.communication.powersgd import PowerSgd
from train.world import GlooWorld

RANK = 2
STEPS = 6


def resnet18() -> tuple[tuple[int, ...], ...]:
    """Shapes of ResNet-18 for CIFAR-10 (He et al. 2016): 3 x 3 stem, four stages of two blocks,
    batch norms' two vectors, a linear layer."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, before, 3, 3), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            if block == 0 and before != width:
                shapes += [(width, before, 1, 1), (width,), (width,)]
            before = width
    return (*shapes, (10, 512), (10,))


@pytest.mark.parametrize(("rank", "published"), [(1, 243), (2, 136), (4, 72)])
def test_the_ratio_of_resnet18_is_the_published_one(rank: int, published: int):
    """Table 3 of the paper: 1023 MB an epoch become 4 (243x), 8 (136x) and 14 (72x)."""
    part = Part("all", resnet18())
    assert part.elements == 11_173_962
    sent = PowerSgd(rank, 0, 0).formula_bytes(part, 4, 4)
    dense = 4 * part.elements * 2 * 3 / 4
    assert dense / sent == pytest.approx(published, rel=0.01)


def sent_by_one_step(world: ThreadWorld, rank: int) -> int:
    part = Part("all", resnet18())
    transport = ThreadTransport(world)
    local = torch.randn(part.elements, generator=torch.Generator().manual_seed(world.rank))
    PowerSgd(rank, 0, 0).reduce(part, local, transport, 1)
    return transport.sent_bytes


def test_a_step_sends_what_the_ratio_says():
    """On the counting transport: r (n + m) for each matrix, vectors whole; two ranks send a tensor
    once each."""
    values = 0
    for shape in resnet18():
        n, m = shape[0], math.prod(shape[1:])
        values += RANK * (n + m) if len(shape) > 1 else n
    assert on_threads(2, sent_by_one_step, RANK) == [4 * values] * 2


class Net(nn.Module):
    """Three matrices and their vectors; the last is too small to be worth it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 3)
        ).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def weights_after(world: GlooWorld, mine: bool, **changed: Any) -> list[torch.Tensor]:
    """Of DDP, trained with this project's hook or torch's, whose first random factors are given to
    both."""
    model = Net()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=False)
    if mine:
        compressor = PowerSgd(RANK, 2, 0, **changed)
        ddp.register_comm_hook(DdpHook(compressor, world), compressed)
        compressor._factors = _with_theirs(compressor, compressor._factors)  # type: ignore
    else:
        state = theirs.PowerSGDState(
            None, RANK, start_powerSGD_iter=2, random_seed=0, min_compression_rate=2
        )
        ddp.register_comm_hook(state, theirs.powerSGD_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + world.rank)
        x = torch.randn(16, 40, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (ddp(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def _with_theirs(compressor: PowerSgd, factors: Any) -> Any:
    """Fills the memory with what torch draws first: its generator's seed, one normal matrix after
    another."""
    import numpy as np

    def filled(part: Part, matrices: list[torch.Tensor], step: int) -> Any:
        if f"factor/{part.key}/0" not in compressor.memory.kept:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(np.random.RandomState(0).randint(1_000_000_000))
                for number, matrix in enumerate(matrices):
                    drawn = torch.randn(1, matrix.shape[1], RANK, dtype=torch.float64)
                    name = f"factor/{part.key}/{number}"
                    compressor.memory.kept[name] = drawn.flatten()
        return factors(part, matrices, step)

    return filled


def compared(world: GlooWorld) -> dict[str, float]:
    """Largest difference of weights from torch's, of the method and of what it is not."""
    expected = weights_after(world, mine=False)
    changes: dict[str, dict[str, Any]] = {
        "same": {},
        "no error feedback": {"error_feedback": False},
        "no orthogonal base": {"orthogonal": False},
    }
    found = {}
    for name, changed in changes.items():
        weights = weights_after(world, mine=True, **changed)
        pairs = zip(weights, expected, strict=True)
        found[name] = max(float((a - b).abs().max()) for a, b in pairs)
    dist.barrier()
    return found


def test_equals_torchs_hook():
    """Over DDP on two processes, bucket for bucket, two dense steps and four compressed ones."""
    for rank in on_ranks(2, compared):
        assert rank["same"] < 1e-6
        assert rank["no error feedback"] > 1e-4
        assert rank["no orthogonal base"] > 1e-4


def reduced(world: ThreadWorld, shape: tuple[int, int], rank: int, warm: bool) -> list[float]:
    """Relative error of the sum of one matrix, the same at each step, nothing fed back."""
    part = Part("m", (shape,))
    compressor = PowerSgd(rank, 0, 0, error_feedback=False, warm_start=warm)
    generator = torch.Generator().manual_seed(world.rank)
    local = torch.randn(shape, generator=generator, dtype=torch.float64).flatten()
    whole = local.clone()
    world.all_reduce(whole)
    errors = []
    for step in range(1, 41):
        found = compressor.reduce(part, local, ThreadTransport(world), step)
        compressor.memory.commit()
        errors.append(float((found - whole).norm() / whole.norm()))
    return errors


def test_warm_start_finds_the_best_projection():
    """Power iteration on one matrix ends at the truncated SVD, which no product of this rank beats;
    a fresh start each step does not get there."""
    shape, rank = (30, 24), 3
    gathered = sum(
        torch.randn(shape, generator=torch.Generator().manual_seed(r), dtype=torch.float64)
        for r in range(2)
    )
    values = torch.linalg.svdvals(gathered)
    best = float(values[rank:].norm() / values.norm())
    warm = on_threads(2, reduced, shape, rank, True)[0]
    cold = on_threads(2, reduced, shape, rank, False)[0]
    assert all(error >= best - 1e-12 for error in warm + cold)
    assert warm[-1] == pytest.approx(best, rel=0.01)
    assert min(cold) > 1.02 * best
