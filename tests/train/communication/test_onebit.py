"""1-bit Adam: warm-up, freeze, signs with errors fed back in both directions, bytes, and loss."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import tiny
from tests.train.communication.learning import job, learn, losses
from tests.train.communication.threads import Table, ThreadTransport, ThreadWorld, on_threads
from train.communication import onebit
from train.communication.compressor import Part
from train.communication.freeze import Freeze
from train.communication.onebit import FLOOR, OneBitAdam, SignCompressor
from train.communication.signs import BLOCK, decode, encode, sign_layout
from train.data.corpus import open_corpus
from train.job import OptimizerTable
from train.layout import FlatModel

FREEZE = 40


def table(warmup: int) -> dict[str, Any]:
    return {"kind": "onebit", "warmup_steps": warmup}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("corpus")
    tiny.corpus(path)
    return path


def test_a_bit_is_a_sign_and_a_scale_the_mean_magnitude():
    values = torch.tensor([3.0, -1.0, 2.0, 0.5, -0.5, -8.0, 0.0, 0.0])
    payload = encode(values, [3, 3, 2], 4)
    assert payload.dtype == torch.uint8 and len(payload) == 4 * 4 + 1
    assert payload[-1] == 0b10110011
    found = decode(payload, [3, 3, 2], 4, torch.float64)
    assert found.tolist() == [2, -2, 2, 3, -3, -3, 0, 0]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_stretches_cover_everything_once(size: int):
    layout = sign_layout([(0, 1000), (1000, 1003), (1003, 1700)], size)
    assert layout.width % 8 == 0 and layout.width * size >= 1700
    assert [sum(lengths) for lengths in layout.lengths] == [layout.width] * size


def test_a_scale_is_of_a_block_of_one_tensor():
    """Blocks of BLOCK values, a tensor's last one of half to one and a half of them; with one scale
    for all of it, a small row would get the steps of a large one."""
    end = 2 * BLOCK + BLOCK // 2
    layout = sign_layout([(0, end - 8), (end - 8, 2 * end - 8)], 1)
    assert layout.lengths == ((BLOCK, 3 * BLOCK // 2 - 8, BLOCK, BLOCK, BLOCK // 2),)
    values = torch.cat([torch.full((BLOCK,), 9.0), torch.full((2 * BLOCK,), -1.0)])
    [lengths] = sign_layout([(0, 3 * BLOCK)], 1).lengths
    assert torch.equal(decode(encode(values, lengths, 3), lengths, 3, torch.float32), values)


def gradients(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    noise = torch.randn(600, generator=generator, dtype=torch.float64)
    return noise + torch.linspace(-1, 1, 600, dtype=torch.float64)


def mean_error(world: ThreadWorld, feedback: bool, steps: int) -> float:
    """How far the sum of all that came is from the sum of all that was given, by step."""
    part, link = Part("p", ((20, 20), (200,))), ThreadTransport(world)
    compressor = SignCompressor(0, error_feedback=feedback)
    owed = torch.zeros(600, dtype=torch.float64)
    for step in range(1, steps + 1):
        local = gradients(world.rank, step)
        owed -= compressor.reduce(part, local, link, step)
        world.all_reduce(local)
        owed += local
        compressor.memory.commit()
    return float(owed.norm()) / steps


def test_what_is_lost_is_sent_later():
    """With error feedback what is owed stays bounded, so its share falls as 1 / steps."""
    fed = [on_threads(3, mean_error, True, steps)[0] for steps in (20, 160)]
    lost = [on_threads(3, mean_error, False, steps)[0] for steps in (20, 160)]
    assert fed[1] < 0.2 * fed[0]
    assert lost[1] > 0.6 * lost[0]


def test_until_the_freeze_it_is_adam(corpus: Path):
    adam = losses(corpus, job(12))
    mine = losses(corpus, job(12, compression=table(12)))
    assert mine["losses"] == adam["losses"] and mine["sent"] == mine["dense"]
    later = losses(corpus, job(12, compression=table(6)))
    assert later["losses"][:7] == adam["losses"][:7] and later["losses"][8] != adam["losses"][8]


def frozen(corpus: Path, steps: int, freeze: int) -> list[float]:
    """Adam whose second moment stays from step `freeze` on, written plainly on one process."""
    wanted = job(steps, optimizer={"clip_norm": 0, "weight_decay": 0}, **DOUBLE)
    training = tiny.trainer(wanted, open_corpus(corpus).train)
    table = wanted.optimizer
    weights = training.flat.named(training.flat.masters)
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    told = []
    for step in range(1, steps + 1):
        training.flat.clear_gradient()
        batch = training.stream.batch((step - 1) * wanted.batch_samples, wanted.batch_samples)
        loss = training.model.loss(batch) / wanted.run.batch_tokens
        loss.backward()
        told.append(float(loss.detach()))
        rate = table.learning_rate * rate_factor(wanted, step)
        grown = 1 - table.beta2 ** min(step, freeze)
        for name, gradient in training.flat.named(training.flat.gradient).items():
            first[name] = table.beta1 * first[name] + (1 - table.beta1) * gradient
            if step <= freeze:
                second[name] = table.beta2 * second[name] + (1 - table.beta2) * gradient**2
            root = (second[name] / grown).sqrt()
            if step > freeze:
                root = root.clamp(min=FLOOR * float(root.square().mean().sqrt()))
            change = first[name] / (1 - table.beta1**step) / (root + table.epsilon)
            weights[name].sub_(rate * change)
    return told


DOUBLE: dict[str, Any] = {"precision": {"compute": "float64"}}


def rate_factor(wanted: Any, step: int) -> float:
    """The default schedule, a cosine after 5 % of warm-up, falling to a tenth."""
    warmup = round(0.05 * wanted.steps)
    if step <= warmup:
        return float(step / warmup)
    done = (step - warmup) / (wanted.steps - warmup)
    return float(0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def test_alone_it_is_adam_with_its_variance_frozen(corpus: Path):
    """Nothing is sent, so nothing is lost."""
    tables = {"optimizer": {"clip_norm": 0, "weight_decay": 0}, **DOUBLE}
    wanted = job(14, compression=table(6), **tables)
    [mine] = on_threads(1, learn, open_corpus(corpus).train, wanted)
    torch.testing.assert_close(mine["losses"], frozen(corpus, 14, 6), rtol=1e-9, atol=1e-9)
    assert mine["sent"] == 0


def test_a_thirtieth_of_the_bytes(corpus: Path):
    """On the small Llama, scales included, as counted; and as the formula has it."""
    found = losses(corpus, job(8, compression=table(4)))
    assert found["dense"] / found["sent"] >= 30
    assert found["sent"] == found["formula"]


def after_the_freeze(floor: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """The longest step, in learning rates, of weights whose gradients begin after the freeze."""
    monkeypatch.setattr(onebit, "FLOOR", floor)
    model = torch.nn.Linear(64, 32, bias=False).double()
    flat = FlatModel(model, torch.float64)
    rule = OneBitAdam(flat, OptimizerTable(weight_decay=0), Freeze(10, 0.95, 0))
    compressor, longest = SignCompressor(10), 0.0
    link = ThreadTransport(ThreadWorld(Table(1), 0))
    for step in range(1, 31):
        flat.gradient.copy_(torch.randn(2048, generator=torch.Generator().manual_seed(step)))
        if step <= 10:
            flat.view(flat.gradient, flat.slots[0])[:, :4] = 0
        else:
            part = Part("p", ((32, 64),))
            local = rule.outgoing(0, 2048, 1)
            flat.gradient.copy_(compressor.reduce(part, local, link, step))
        before = flat.masters.clone()
        rule.update(step, 1e-3)
        longest = max(longest, float((flat.masters - before).abs().max()) / 1e-3)
    return longest


def test_what_the_warm_up_never_saw_does_not_fly_off(monkeypatch: pytest.MonkeyPatch):
    """A row of an embedding whose token comes late has no variance: its root has a floor, which
    bounds its steps; the mutation is none."""
    assert after_the_freeze(FLOOR, monkeypatch) < 4 / FLOOR
    assert after_the_freeze(0, monkeypatch) > 1e4


def forgetful(training: Any) -> None:
    training.exchange.compressor.error_feedback = False


@pytest.mark.slow
def test_errors_have_to_be_remembered(corpus: Path):
    """The mutation: the same without memory ends at least a tenth higher."""
    wanted = job(compression=table(FREEZE))
    assert losses(corpus, wanted, forgetful)["end"] > 1.1 * losses(corpus, wanted)["end"]


@pytest.mark.slow
def test_the_variance_has_to_be_known(corpus: Path):
    """The mutation: frozen after one step it ends higher."""
    early, late = (losses(corpus, job(compression=table(steps))) for steps in (1, FREEZE))
    assert early["end"] > 1.05 * late["end"]
