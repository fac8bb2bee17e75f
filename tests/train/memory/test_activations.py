"""Mesa, GACT and checkpointing: exact losses, fewer bytes, gradients that are right on average.

One suite for every way of keeping activations, and what is particular to each.
"""

import math
from typing import Any

import pytest
import torch

from tests.train.memory import layers
from train.memory import codec
from train.memory.activations import CodedLayers
from train.memory.gact import Gact
from train.memory.mesa import DECAY, Mesa
from train.memory.plan import activation_bytes
from train.memory.saved import Form, SavedAs

WAYS: dict[str, dict[str, Any]] = {
    "keep": {"activations": "keep"},
    "recompute": {"activations": "recompute"},
    "cheap": {"activations": "recompute", "recompute": "cheap"},
    "first layer": {"activations": "recompute", "layers": 1},
    "mesa": {"activations": "mesa"},
    "gact 8": {"activations": "gact", "bits": 8},
    "gact 4": {"activations": "gact", "bits": 4},
}
EXACT = ("keep", "recompute", "cheap", "first layer")
RATIOS = {"mesa": 3.3, "gact 8": 3.3, "gact 4": 5.5}
OFF = {"mesa": 0.02, "gact 8": 0.01, "gact 4": 0.08}
"""How far one draw's gradient may be from the exact one."""


def exact() -> tuple[float, torch.Tensor]:
    return layers.gradient(layers.build(layers.job("float64"))[0], layers.tokens())


def coded(name: str, compute: str = "float64") -> CodedLayers:
    made = layers.build(layers.job(compute, **WAYS[name]))[1]
    assert made is not None
    return made


@pytest.mark.parametrize("name", WAYS)
def test_the_loss_is_the_same_and_the_gradient_near(name: str):
    model, _ = layers.build(layers.job("float64", **WAYS[name]))
    loss, gradient = layers.gradient(model, layers.tokens())
    expected, right = exact()
    assert loss == expected
    off = layers.relative(gradient, right)
    assert off == 0 if name in EXACT else 1e-5 < off < OFF[name]


@pytest.mark.parametrize("name", RATIOS)
def test_saved_bytes(name: str):
    """Of the whole stack, ranges and what is kept exactly included, against float32."""
    plain = layers.plain_bytes(layers.build(layers.job())[0])
    made = coded(name, "float32")
    layers.gradient(made.model, layers.tokens())
    assert plain / layers.saved_bytes(made.model) >= RATIOS[name]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in WAYS if name != "first layer"])
def test_bytes_are_the_formulas(name: str, compute: str):
    job = layers.job(compute, **WAYS[name])
    model, _ = layers.build(job)
    layers.gradient(model, layers.tokens())
    plain, changed = activation_bytes(job, layers.config(job), 2 * layers.TOKENS)
    entry = layers.entry(model)
    if name == "keep":
        measured = layers.plain_bytes(model)
        assert plain == changed
    else:
        measured = layers.saved_bytes(model)
        # The stack's input was there before it; who computes again has it, too.
        measured += entry.nbytes if name in EXACT else 0
    angles = 2 * layers.TOKENS * 16 * entry.element_size()
    assert measured - angles == pytest.approx(changed, rel=0.01)


def mean_errors(made: CodedLayers, draws: tuple[int, ...]) -> list[float]:
    """How far the mean of so many draws is from the exact gradient."""
    _, right = exact()
    total, found = torch.zeros_like(right), []
    for draw in range(max(draws)):
        made.seed = draw
        total += layers.gradient(made.model, layers.tokens())[1]
        if draw + 1 in draws:
            found.append(layers.relative(total / (draw + 1), right))
    return found


@pytest.mark.parametrize("name", RATIOS)
def test_the_mean_of_gradients_nears_the_exact_one(name: str):
    few, many = mean_errors(coded(name), (2, 32))
    assert few / many == pytest.approx(math.sqrt(32 / 2), rel=0.2)


@pytest.mark.parametrize("name", RATIOS)
def test_without_chance_it_does_not(name: str, monkeypatch: pytest.MonkeyPatch):
    """The mutation: rounding to the nearest level."""
    monkeypatch.setattr(codec, "noise", lambda like, _: torch.full_like(like, 0.5))
    few, many = mean_errors(coded(name), (2, 8))
    assert few / many < 1.5


def test_chance_is_keyed_by_the_tokens():
    """The same tokens draw the same; a run that goes on therefore draws what it would have."""
    one, other = coded("gact 4"), coded("gact 4")
    other.codec.generator.manual_seed(99)
    batch = layers.tokens()
    assert torch.equal(layers.gradient(one.model, batch)[1], layers.gradient(other.model, batch)[1])
    first = layers.gradient(one.model, layers.tokens(1))[1]
    one.seed = 1
    assert not torch.equal(layers.gradient(one.model, layers.tokens(1))[1], first)


def test_a_tensor_that_many_save_is_kept_once():
    """Query, key and value have one input."""
    seen: list[str] = []

    class Counting(Mesa):
        def encode(self, place: str, flat: torch.Tensor, form: Form):
            seen.append(place)
            return super().encode(place, flat, form)

    x = torch.randn(8, 8, requires_grad=True)
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(3)]
    y = x * 1.0
    with SavedAs(Counting(), "n", 1, x, weights):
        out = sum((y @ weight).sum() for weight in weights)
    assert seen == ["n/0"]
    out.backward()  # type: ignore[union-attr]
    assert x.grad is not None and weights[2].grad is not None


def test_mesas_ranges_are_running_means():
    """Two heads of one number each, by hand: 0.9 of what was, 0.1 of what is."""
    mesa = Mesa()
    for low, high in ((-1.0, 10.0), (-3.0, 30.0), (-2.0, 20.0)):
        flat = torch.tensor([low, 0.0, 0.0, high])  # two rows of two heads
        mesa.encode("p", flat, Form(2, 2, 1))
    low = 0.9 * (0.9 * -1 + 0.1 * -3) + 0.1 * -2
    high = 0.9 * (0.9 * 10 + 0.1 * 30) + 0.1 * 20
    wanted = torch.tensor([[low, 0.0], [0.0, high]], dtype=torch.float64)
    torch.testing.assert_close(mesa.ranges["p"], wanted)


def test_what_is_beyond_mesas_range_is_cut_off():
    mesa = Mesa()
    for _ in range(2):
        mesa.encode("p", torch.tensor([-1.0, 1.0]), Form(1, 1, 2))
    found = mesa.encode("p", torch.tensor([-1.0, 5.0]), Form(1, 1, 2)).decode()
    assert float(found[1]) == pytest.approx(DECAY * 1 + (1 - DECAY) * 5, rel=0.01)


def variance(made: CodedLayers, draws: int = 6) -> float:
    _, right = exact()
    errors = []
    for draw in range(draws):
        made.seed = draw
        errors.append(layers.relative(layers.gradient(made.model, layers.tokens())[1], right) ** 2)
    return sum(errors) / draws


def test_bits_by_sensitivity_beat_equal_bits_and_bits_against_it():
    made = coded("gact 4")
    shared = variance(made)
    assert isinstance(made.codec, Gact)
    bits = made.codec.bits
    assert len(set(bits.values())) > 1
    made.codec.bits = dict.fromkeys(bits, 4)
    equal = variance(made)
    made.codec.bits = {place: max(1, 8 - bits[place]) for place in bits}  # the mutation
    assert shared < 0.9 * equal < equal < variance(made)


def test_bits_are_shared_out_again_when_due():
    made = coded("gact 4")
    assert isinstance(made.codec, Gact)
    made.codec.every = 2
    layers.gradient(made.model, layers.tokens())
    made.codec.bits = {}
    layers.gradient(made.model, layers.tokens())
    assert made.codec.bits == {}
    layers.gradient(made.model, layers.tokens())
    assert made.codec.bits and made.codec.passes == 3


@pytest.mark.parametrize("name", ["mesa", "gact 4"])
def test_a_codecs_state_goes_on(name: str):
    first, second = coded(name), coded(name)
    layers.gradient(first.model, layers.tokens(0))
    second.codec.load(first.codec.state())
    third = coded(name)
    batch = layers.tokens(1)
    wanted = layers.gradient(first.model, batch)[1]
    assert torch.equal(layers.gradient(second.model, batch)[1], wanted)
    assert not torch.equal(layers.gradient(third.model, batch)[1], wanted)


def test_evaluation_leaves_no_trace():
    made = coded("mesa")
    with torch.no_grad():
        made.model.loss(layers.tokens())
    assert made.codec.state() == {}
