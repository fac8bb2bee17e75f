"""The integer-only decoder: no float in its graph, the bits of an independent model, its logits."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from kernels.reference import integer
from models.decoder import Decoder
from models.integer import IntegerDecoder, Layer, Past, Rotation
from models.integer_build import build, observe
from models.load import load_model
from tests.models import integer_numpy
from tests.models.integer_walk import floats_in, graph_of
from tests.models.sequences import Sequences
from tests.models.tiny import write_byte_level
from tests.prove import kernel_integer

TOKENS = 24
TEXT = [(7 * n * n + 3 * n) % 256 for n in range(TOKENS)]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def floats(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A tiny decoder of two layers, grouped queries; qwen2 has biases."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return load_model(str(write_byte_level(path, architecture=request.param)))


@pytest.fixture(scope="module")
def decoder(floats: Decoder) -> IntegerDecoder:
    return build(floats, observe(floats, [TEXT[::-1]]))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> IntegerDecoder:
    """The one with biases: tracing takes seconds."""
    path = tmp_path_factory.mktemp("traced") / "tiny.gguf"
    floats = load_model(str(write_byte_level(path, architecture="qwen2")))
    return build(floats, observe(floats, [TEXT]))


def rotation(decoder: IntegerDecoder, tokens: int = TOKENS) -> Rotation:
    return Rotation(*(table[:tokens] for table in decoder.tables))


def layer_graph(decoder: IntegerDecoder, turned: Rotation) -> GraphModule:
    def layer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made, past = decoder.layers[0](x, turned)
        return made, *past

    return graph_of(layer, stream(decoder, 1000)[:, :4])


def stream(decoder: IntegerDecoder, scale: int) -> torch.Tensor:
    """A residual stream int32 [1, TOKENS, hidden] of about `scale`."""
    random = torch.Generator().manual_seed(scale)
    shape = (1, TOKENS, decoder.config.hidden)
    return torch.randint(-scale, scale + 1, shape, generator=random, dtype=torch.int32)


def test_a_layer_has_no_float(traced: IntegerDecoder):
    graph = layer_graph(traced, rotation(traced, 4))
    assert len(graph.graph.nodes) > 200
    assert sum(node.target is torch.ops.aten._int_mm.default for node in graph.graph.nodes) == 24
    assert floats_in(graph) == []


def test_the_decoder_from_ids_to_logits_has_no_float(traced: IntegerDecoder):
    graph = graph_of(lambda ids: traced(ids)[0], torch.tensor([TEXT[:4]]))
    assert floats_in(graph) == []


def scaled_by_a_float(x: torch.Tensor, shift: torch.Tensor | int) -> torch.Tensor:
    return (x * 2.0**-1).round().long()


def weighed_in_floats(x: torch.Tensor) -> torch.Tensor:
    return x.float().exp().int()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("round_shift", scaled_by_a_float),
        ("exp", weighed_in_floats),
        ("isqrt", lambda values: torch.sqrt(values).long()),
        ("sigmoid", lambda x: x.true_divide(3).long()),
        ("split", lambda x: integer.Pair(*(x.clamp(max=0.5).char() for _ in range(2)))),
    ],
)
def test_a_float_that_slips_in_is_found(
    traced: IntegerDecoder, monkeypatch: pytest.MonkeyPatch, name: str, other: object
):
    monkeypatch.setattr(integer, name, other)
    assert floats_in(layer_graph(traced, rotation(traced, 4)))


def test_a_float_table_is_found(traced: IntegerDecoder):
    tables = Rotation(*(table.double() for table in rotation(traced, 4)))
    assert floats_in(layer_graph(traced, tables))


@pytest.mark.parametrize("scale", [1, 1000, 1 << 20, (1 << 31) - 1])
def test_a_layer_has_the_bits_of_the_numpy_model(decoder: IntegerDecoder, scale: int):
    x, turned = stream(decoder, scale), rotation(decoder)
    cos, sin = (integer_numpy.array(table[:, 0]) for table in turned)
    for layer in decoder.layers:
        made, _ = layer(x, turned)
        wanted = integer_numpy.layer(integer_numpy.array(x[0]), layer, cos, sin)
        assert made.dtype == torch.int32 and torch.equal(made[0].long(), torch.tensor(wanted))
        x = made
    assert len({*x.flatten().tolist()}) > TOKENS


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: replace(layer, out=replace(layer.out, multiplier=layer.out.multiplier + 9)),
        lambda layer: replace(layer, down=replace(layer.down, shift=layer.down.shift - 1)),
        lambda layer: replace(layer, shifts=replace(layer.shifts, key=layer.shifts.key + 1)),
    ],
)
def test_the_numpy_model_tells_layers_apart(decoder: IntegerDecoder, change):
    layer, x, turned = decoder.layers[0], stream(decoder, 1 << 20), rotation(decoder)
    cos, sin = (integer_numpy.array(table[:, 0]) for table in turned)
    wanted = integer_numpy.layer(integer_numpy.array(x[0]), layer, cos, sin)
    other: Layer = change(layer)
    assert not torch.equal(other(x, turned)[0][0].long(), torch.tensor(wanted))


def test_how_a_text_is_cut_changes_no_bit(decoder: IntegerDecoder):
    ids = torch.tensor([TEXT, TEXT[::-1]])
    whole, pasts = decoder(ids)
    assert pasts[0].keys.dtype == torch.int16
    pieces: list[torch.Tensor] = []
    before: list[Past] | None = None
    for piece in torch.split(ids, [1, 1, 5, TOKENS - 7], 1):
        logits, before = decoder(piece, before)
        pieces.append(logits)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(decoder(ids[1:])[0], whole[1:])


def test_logits_are_those_of_floats_over_the_same_weights(floats: Decoder):
    """Without the rounding of weights to int8, which random ones suffer from, little is lost."""
    floats = deepcopy(floats)
    for weight in (each for each in floats.parameters() if each.dim() == 2):
        scales = weight.abs().amax(1, keepdim=True) / 127
        weight.copy_((weight / scales).round() * scales)
    decoder = build(floats, observe(floats, [TEXT]))
    logits = decoder(torch.tensor([TEXT]))[0][0]
    wanted = Sequences(floats, 1, TOKENS).step([(0, TEXT)])
    lost = logits.double() * 2.0**-decoder.logit_point - wanted
    assert logits.dtype == torch.int32
    assert lost.norm() < 3e-3 * wanted.norm()


def test_more_than_the_context_is_refused(decoder: IntegerDecoder):
    _, pasts = decoder(torch.tensor([TEXT * 10]))
    with pytest.raises(ValueError, match="257 tokens do not fit .* up to 256 are accepted"):
        decoder(torch.tensor([TEXT[:17]]), pasts)


def test_what_does_not_fit_is_refused_with_a_sentence(floats: Decoder, monkeypatch):
    ranges = observe(floats, [TEXT])
    with pytest.raises(ValueError, match=r"gates of 1e\+06 do not fit"):
        build(floats, ranges | {"layers.1.feedforward.gate_up.out": 1e6})
    with pytest.raises(ValueError, match="norm.out is inf on this text"):
        build(floats, ranges | {"norm.out": float("inf")})
    with pytest.raises(ValueError, match=r"a shift by -\d+; 18\.\.62 are accepted"):
        build(floats, ranges | {"layers.0.mixer_norm.out": 1e12})
    monkeypatch.setattr(integer, "products_are_exact", lambda: False)
    with pytest.raises(ValueError, match="_int_mm saturates"):
        build(floats, ranges)


def test_ranges_are_the_largest_of_every_text(floats: Decoder):
    first, second = observe(floats, [TEXT]), observe(floats, [TEXT[::-1]])
    both = observe(floats, [TEXT, TEXT[::-1]])
    assert both == {name: max(first[name], second[name]) for name in first}
    assert first != second and {"norm.in", "logits", "layers.1.mixer.qkv.v"} <= set(first)
    assert not any(module._forward_hooks for module in floats.modules())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_model_stays_within_three_percent_of_its_perplexity(smollm2_path: Path):
    """And what else is proved of it: no float, the NumPy model's bits, the functions' errors."""
    missed = [row for row in kernel_integer.rows() if not row.ok]
    assert missed == []
