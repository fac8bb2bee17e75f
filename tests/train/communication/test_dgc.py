"""Deep Gradient Compression against the paper's rule written plainly, and its bytes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import tiny
from tests.train.communication.learning import job, losses
from tests.train.communication.threads import ThreadTransport, ThreadWorld, on_threads
from train.communication.compressor import Part
from train.communication.dgc import DeepGradient

SHAPES = ((40, 30), (30,), (7, 3))
PART = Part("p", SHAPES)
RATIO = 0.05
MOMENTUM = 0.9
STEPS = 8


def gradient(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(PART.elements, generator=generator, dtype=torch.float64)


def run(world: ThreadWorld, settings: dict[str, Any]) -> dict[str, Any]:
    """Sums of each step, and what is kept back after it."""
    compressor = DeepGradient(RATIO, MOMENTUM, 0, **settings)
    link = ThreadTransport(world)
    found, kept = [], []
    for step in range(1, STEPS + 1):
        local = gradient(world.rank, step)
        found.append(compressor.reduce(PART, local, link, step))
        compressor.memory.commit()
        kept.append(dict(compressor.memory.kept))
    return {"found": found, "kept": kept, "sent": link.sent_bytes}


def plainly(ranks: int) -> list[torch.Tensor]:
    """Algorithm 1 of the paper with momentum factor masking, by loops over tensors and ranks."""
    u = [[torch.zeros(math.prod(s)).double() for s in SHAPES] for _ in range(ranks)]
    v = [[torch.zeros(math.prod(s)).double() for s in SHAPES] for _ in range(ranks)]
    sums = []
    for step in range(1, STEPS + 1):
        parts = [torch.zeros(math.prod(shape)).double() for shape in SHAPES]
        for rank in range(ranks):
            for layer, piece in enumerate(gradient(rank, step).split([1200, 30, 21])):
                u[rank][layer] = MOMENTUM * u[rank][layer] + piece
                v[rank][layer] = v[rank][layer] + u[rank][layer]
                count = math.ceil(RATIO * len(piece))
                threshold = v[rank][layer].abs().sort(descending=True).values[count - 1]
                mask = v[rank][layer].abs() >= threshold
                parts[layer] += v[rank][layer] * mask
                v[rank][layer] = v[rank][layer] * ~mask
                u[rank][layer] = u[rank][layer] * ~mask
        sums.append(torch.cat(parts))
    return sums


def test_is_the_papers_algorithm():
    expected = plainly(3)
    for rank in on_threads(3, run, {}):
        for mine, plain in zip(rank["found"], expected, strict=True):
            torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"masking": False}, {"correction": False}])
def test_without_a_part_of_it_it_is_another(settings: dict[str, Any]):
    """The mutations."""
    expected = plainly(2)
    [rank, _] = on_threads(2, run, settings)
    assert max(float((a - b).abs().max()) for a, b in zip(rank["found"], expected, strict=True)) > 1


def test_what_is_sent_and_what_is_kept_are_the_gradient():
    """In each step: the accumulation before, plus the momentum, is what was sent and what stays."""
    ranks = on_threads(2, run, {"masking": False})
    momenta = [torch.zeros(PART.elements).double() for _ in range(2)]
    before = torch.zeros(PART.elements).double()
    for step in range(STEPS):
        for rank in range(2):
            momenta[rank] = MOMENTUM * momenta[rank] + gradient(rank, step + 1)
        kept = sum(rank["kept"][step]["accumulated/p"] for rank in ranks)
        sent = ranks[0]["found"][step]
        torch.testing.assert_close(sent + kept, before + sum(momenta), rtol=0, atol=1e-12)
        before = kept


def test_the_share_falls_as_published():
    """75 %, 93.75 %, 98.4375 %, 99.6 % left out in the warm-up, then 99.9 %."""
    compressor = DeepGradient(0.001, 0.9, 8)
    left_out = [100 * (1 - compressor.density(step)) for step in range(1, 10)]
    expected = [75, 75, 93.75, 93.75, 98.4375, 98.4375, 99.609375, 99.609375, 99.9]
    assert left_out == pytest.approx(expected)


def one_step(world: ThreadWorld, part: Part) -> int:
    link = ThreadTransport(world)
    local = torch.randn(part.elements, generator=torch.Generator().manual_seed(world.rank))
    DeepGradient(0.001, 0.9, 0).reduce(part, local, link, 1)
    return link.sent_bytes


def test_a_payload_is_at_most_four_thousandths_of_dense():
    """At 99.9 %, values and indices: of matrices and vectors of a Llama's sizes, for two ranks, who
    send it once each."""
    part = Part("p", ((512, 256), (704, 256), (256, 704), (256,), (256,)))
    dense = 4 * part.elements
    for sent in on_threads(2, one_step, part):
        assert 0.0019 * dense < sent <= 0.004 * dense


@pytest.mark.slow
def test_momentum_correction_helps(tmp_path: Path):
    """A small Llama by SGD, one value in a hundred sent: gradients gathered up without their
    momentum learn less (figure 2 and table 3 of the paper)."""
    tiny.corpus(tmp_path)
    table = {"kind": "dgc", "ratio": 0.01, "warmup_steps": 20}
    wanted = job(compression=table, optimizer={"name": "sgd", "learning_rate": 0.3})

    def without(training: Any) -> None:
        training.exchange.compressor.correction = False

    corrected = losses(tmp_path, wanted)["end"]
    assert corrected < 0.98 * losses(tmp_path, wanted, without)["end"]
