"""The decoder over packed weights: against the reference decoder on the same numbers, through
pages, chunks and batches; and the default model's text."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.cpu import ops
from kernels.reference.dequantize import dequantize
from models.config import ModelConfig
from models.decoder import Decoder
from models.load import TextModel, load_for_cpu, load_model
from models.packed import PackedDecoder
from tests.kernels.blocks import flat, random_blocks
from tests.models import tiny
from tests.models.sequences import Sequences
from tests.models.test_smollm2 import PROMPTS, greedy, prompt_ids
from tests.models.tiny import write_byte_level

CONFIG = ModelConfig(
    name="tiny",
    layers=3,
    hidden=96,
    heads=6,
    kv_heads=2,
    head_dim=32,
    ff=160,
    vocab=80,
    context_tokens=256,
    rms_eps=1e-5,
    tied_head=True,
)
# Whole blocks of 256.
LARGER = replace(CONFIG, layers=2, hidden=256, heads=8, ff=512)


class Twins:
    """One random model, packed and decoded. form: of every matrix, or "mixed" for what files of
    K-quants have."""

    def __init__(self, config: ModelConfig = CONFIG, form: str = "Q4_1") -> None:
        self.seed = 0
        self.reference = Decoder(config).requires_grad_(False).eval()
        values = dict(self.reference.named_parameters())
        mixed = form == "mixed"
        values_form, form = ("Q6_K", "Q4_K") if mixed else (form, form)
        embed = self._matrix(values["embed.weight"], "Q6_K" if mixed else "Q8_0")
        layers = []
        for layer in range(config.layers):
            names = ("mixer.qkv", "mixer.out", "feedforward.gate_up", "feedforward.down")
            fused, *others = (values[f"layers.{layer}.{n}.weight"] for n in names)
            qkv = self._fused(fused, config, [form, form, values_form])
            out, gate_up = (self._matrix(each, form) for each in others[:2])
            down = self._matrix(others[2], values_form)
            before, between = (
                self._vector(values[f"layers.{layer}.{n}.weight"])
                for n in ("mixer_norm", "feedforward_norm")
            )
            bias = torch.empty(0)
            if config.qkv_bias:
                bias = self._vector(values[f"layers.{layer}.mixer.qkv.bias"])
            weights = ops.LayerWeights(qkv, out, gate_up, down, before, between, bias)
            layers.append(weights)
        norm = self._vector(values["norm.weight"])
        self.packed = PackedDecoder(config, embed, layers, norm, embed)

    def _fused(
        self, parameter: torch.nn.Parameter, config: ModelConfig, forms: list[str]
    ) -> tuple[ops.Packed, ...]:
        """Queries, keys and values: one matrix if they are of one format, else one each."""
        if len(set(forms)) == 1:
            return (self._matrix(parameter, forms[0]),)
        heads = (config.heads, config.kv_heads, config.kv_heads)
        parts = [
            torch.nn.Parameter(p) for p in parameter.split([n * config.head_dim for n in heads])
        ]
        made = tuple(self._matrix(p, form) for p, form in zip(parts, forms, strict=True))
        parameter.data = torch.cat([p.data for p in parts])
        return made

    def _matrix(self, parameter: torch.nn.Parameter, form: str) -> ops.Packed:
        rows, columns = parameter.shape
        self.seed += 1
        raw = flat(random_blocks(form, rows, columns, self.seed, 1 / math.sqrt(columns)))
        parameter.data = dequantize(raw, form, torch.empty(rows, columns))
        return ops.pack(raw, form, rows, columns)

    def _vector(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        self.seed += 1
        chance = torch.Generator().manual_seed(self.seed)
        parameter.data = 1 + 0.1 * torch.randn(parameter.shape, generator=chance)
        return parameter.data


@pytest.fixture(scope="module")
def twins() -> Twins:
    return Twins()


@pytest.fixture(scope="module")
def mixed_twins() -> Twins:
    return Twins(LARGER, "mixed")


@pytest.fixture(scope="module")
def plain_twins() -> Twins:
    made = Twins(LARGER, "mixed")
    made.packed.activations = "float32"
    return made


def ids(count: int, seed: int = 0) -> list[int]:
    return [(17 * n + 5 * seed + n * n) % CONFIG.vocab for n in range(count)]


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", "mixed"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_logits_are_the_reference_decoder_s(form: str, qkv_bias: bool):
    twins = Twins(replace(LARGER if form == "mixed" else CONFIG, qkv_bias=qkv_bias), form)
    ours, theirs = (Sequences(d, 2, 60) for d in (twins.packed, twins.reference))
    work = [(0, ids(37)), (1, ids(20, 1))]
    for step in (work, [(1, ids(1, 2)), (0, ids(3, 3))], [(0, ids(1, 4)), (1, ids(1, 5))]):
        assert torch.allclose(ours.step(step), theirs.step(step), atol=2e-3)


def test_float32_activations_are_not_rounded(plain_twins: Twins):
    """A hundred times nearer to the reference than 15 bits are asked to be."""
    ours, theirs = (Sequences(d, 1, 40) for d in (plain_twins.packed, plain_twins.reference))
    assert torch.allclose(ours.step([(0, ids(40))]), theirs.step([(0, ids(40))]), atol=2e-5)


@pytest.mark.skipif(not ops.has_matrix_units(), reason="this machine has no AMX")
@pytest.mark.parametrize("activations", ["accurate", "fast"])
def test_fixed_point_is_near_and_single_tokens_are_computed_as_ever(activations, monkeypatch):
    twins = Twins(LARGER, "mixed")
    monkeypatch.setattr(twins.packed, "activations", activations)
    exact = Sequences(twins.packed, 1, 60)
    whole, single = exact.step([(0, ids(40))]), exact.step([(0, ids(1, 3))])
    wanted = Sequences(twins.reference, 1, 60).step([(0, ids(40))])
    monkeypatch.setattr(twins.packed, "batch_invariant", False)
    made = Sequences(twins.packed, 1, 60).step([(0, ids(40))])
    assert not torch.equal(made, whole)
    assert (made - wanted).square().mean().sqrt() < 1e-3 * wanted.square().mean().sqrt()
    # From the same keys and values, a token alone has the same bits.
    alone = Sequences(twins.packed, 1, 60)
    monkeypatch.setattr(twins.packed, "batch_invariant", True)
    alone.step([(0, ids(40))])
    monkeypatch.setattr(twins.packed, "batch_invariant", False)
    assert torch.equal(alone.step([(0, ids(1, 3))]), single)


def test_gates_of_any_size_are_closed_or_open(monkeypatch):
    """Far below -88 e^-x is more than a float holds; the gate is closed all the same."""
    twins = Twins()
    for layer in twins.packed.layers:
        layer.feedforward_norm.mul_(200)  # the reference's, too: they share it
    whole = Sequences(twins.packed, 1, 40).step([(0, ids(40))])
    wanted = Sequences(twins.reference, 1, 40).step([(0, ids(40))])
    assert torch.allclose(whole, wanted, atol=1e-2 * float(wanted.abs().max()))
    layers = ops.layers
    for isa in ops.instruction_sets():
        forced = lambda *args, isa=isa, **terms: layers(*args, **terms | {"isa": isa})  # noqa: E731
        monkeypatch.setattr("models.packed.ops.layers", forced)
        assert torch.equal(Sequences(twins.packed, 1, 40).step([(0, ids(40))]), whole), isa


@pytest.mark.parametrize("which", ["twins", "mixed_twins", "plain_twins"])
def test_chunks_batches_threads_and_instruction_sets_change_no_bit(which, request, monkeypatch):
    twins = request.getfixturevalue(which)
    whole = Sequences(twins.packed, 1, 50).step([(0, ids(50))])
    for cut in (1, 16, 17, 31):
        sequences = Sequences(twins.packed, 3, 64, page_tokens=4, seed=cut)
        sequences.step([(1, ids(9, 7))])
        parts = [sequences.step([(2, ids(3, 8)), (0, ids(50)[:cut])])[3:]]
        parts += [sequences.step([(0, [token]), (1, ids(1, 9))])[:1] for token in ids(50)[cut:]]
        assert torch.equal(torch.cat(parts), whole), cut
    layers = ops.layers
    for isa in ops.instruction_sets():
        for threads in (1, 2, 3):
            forced = lambda *args, isa=isa, threads=threads, **terms: layers(  # noqa: E731
                *args, **{**terms, "isa": isa, "threads": threads}
            )
            monkeypatch.setattr("models.packed.ops.layers", forced)
            assert torch.equal(Sequences(twins.packed, 1, 50).step([(0, ids(50))]), whole)


@pytest.mark.parametrize("kv_format", ["float16", "int8", "int4"])
def test_a_small_cache_changes_little_and_no_bit_by_company(twins: Twins, kv_format: str):
    exact = Sequences(twins.packed, 1, 50).step([(0, ids(50))])
    whole = Sequences(twins.packed, 1, 50, kv_format=kv_format).step([(0, ids(50))])
    bound = {"float16": 1e-3, "int8": 2e-2, "int4": 0.3}[kv_format]
    lost = (whole - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 0 < lost < bound
    sequences = Sequences(twins.packed, 2, 64, page_tokens=4, seed=3, kv_format=kv_format)
    parts = [sequences.step([(1, ids(3, 8)), (0, ids(50)[:31])])[3:]]
    parts += [sequences.step([(0, [token]), (1, ids(1, 9))])[:1] for token in ids(50)[31:]]
    assert torch.equal(torch.cat(parts), whole)


def test_what_other_pages_hold_never_leaks(twins: Twins):
    clean, dirty = (Sequences(twins.packed, 1, 20) for _ in range(2))
    dirty.kv.fill_(float("nan"))
    assert torch.equal(dirty.step([(0, ids(20))]), clean.step([(0, ids(20))]))


def test_a_range_of_layers_is_as_good_as_all(twins: Twins):
    model = twins.packed
    sequences = Sequences(model, 1, 20)
    whole = sequences.step([(0, ids(20))])
    again = Sequences(model, 1, 20)
    step = model._step

    def in_two(x, kv, weights, shape, of_step, **terms):
        layers(x, kv[:1], weights[:1], shape, of_step, **terms)
        layers(x, kv[1:], weights[1:], shape, of_step, **terms)

    layers = ops.layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.packed.ops.layers", in_two)
        assert torch.equal(again.step([(0, ids(20))]), whole)
    assert step is not None and torch.equal(again.kv, sequences.kv)


def test_places_outside_the_cache_are_refused(twins: Twins):
    sequences = Sequences(twins.packed, 1, 16)
    sequences.kv = sequences.kv[:, :, :0].contiguous()
    with pytest.raises(IndexError, match="is not in the cache"):
        sequences.step([(0, ids(3))])


def test_files_that_are_not_taken_are_refused_in_a_sentence(tmp_path: Path):
    path = write_byte_level(tmp_path / "tiny.gguf")
    with pytest.raises(
        ValueError, match="its head_dim is 16, multiples of 32 are accepted; engine.k"
    ):
        load_for_cpu(str(path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="takes GGUF files"):
        load_for_cpu(str(tmp_path / "folder"))
    with pytest.raises(ValueError, match="accurate, fast, float32 are accepted"):
        load_for_cpu(str(path), "slow")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_file_is_computed_as_the_reference_does(architecture: str, tmp_path: Path, monkeypatch):
    """Rotary pairs put in order, parts fused, biases and a last tile that is not full."""
    monkeypatch.setattr(tiny, "HEADS", 2)
    monkeypatch.setattr(tiny, "KV_HEADS", 1)
    monkeypatch.setattr(tiny, "FORMATS", dict.fromkeys(tiny.FORMATS, "Q8_0"))
    path = str(write_byte_level(tmp_path / "tiny.gguf", architecture=architecture))
    packed, reference = load_for_cpu(path), load_model(path)
    assert packed.config.qkv_bias == (architecture == "qwen2") and packed.config.vocab % 16
    ours, theirs = (
        Sequences(decoder, 1, 40).step([(0, ids(40))]) for decoder in (packed, reference)
    )
    assert torch.allclose(ours, theirs, atol=1e-2 * float(theirs.abs().max()))
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


# What llama.cpp's Q4_K_M has: values and a layer's last matrix finer than the others.
K_MIX = dict.fromkeys(tiny.FORMATS, "Q4_K") | dict.fromkeys(
    ("token_embd", "attn_v", "ffn_down"), "Q6_K"
)

# And its Q5_K_M.
K_MIX_5 = {name: "Q5_K" if form == "Q4_K" else form for name, form in K_MIX.items()}


def tiny_of(monkeypatch, folder: Path, formats: dict[str, str], architecture="llama") -> str:
    sizes = {"HIDDEN": 256, "HEADS": 8, "KV_HEADS": 2, "FF": 512, "FORMATS": formats}
    for name, value in sizes.items():
        monkeypatch.setattr(tiny, name, value)
    return str(write_byte_level(folder / "tiny.gguf", architecture=architecture))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "formats,parts",
    [
        (K_MIX, 2),
        (K_MIX | {"attn_k": "Q4_0"}, 3),
        (K_MIX | {"attn_v": "Q4_K"}, 1),
        (K_MIX_5, 2),
        (K_MIX_5 | {"attn_v": "Q5_K", "attn_output": "Q5_0"}, 1),
    ],
)
def test_a_file_of_mixed_formats_is_computed_as_the_reference_does(
    architecture: str, formats, parts: int, tmp_path: Path, monkeypatch
):
    path = tiny_of(monkeypatch, tmp_path, formats, architecture)
    packed, reference = load_for_cpu(path), load_model(path)
    assert [len(layer.qkv) for layer in packed.layers] == [parts] * tiny.LAYERS
    ours, theirs = (
        Sequences(decoder, 1, 40).step([(0, ids(40))]) for decoder in (packed, reference)
    )
    assert torch.allclose(ours, theirs, atol=1e-2 * float(theirs.abs().max()))
    kept = [load_for_cpu(path, cache_dir=tmp_path / "kept") for _ in range(2)][1]
    assert torch.equal(Sequences(kept, 1, 40).step([(0, ids(40))]), ours)


def test_parts_of_formats_of_one_kind_are_fused(tmp_path: Path, monkeypatch):
    """Q4_0 and Q4_1 are packed alike; gate and up have to be."""
    formats = dict.fromkeys(tiny.FORMATS, "Q4_1") | {"attn_k": "Q4_0", "ffn_up": "Q4_0"}
    path = tiny_of(monkeypatch, tmp_path, formats)
    packed, reference = load_for_cpu(path), load_model(path)
    assert len(packed.layers[0].qkv) == 1
    ours, theirs = (
        Sequences(decoder, 1, 40).step([(0, ids(40))]) for decoder in (packed, reference)
    )
    assert torch.allclose(ours, theirs, atol=1e-2 * float(theirs.abs().max()))


def test_formats_that_are_not_taken_are_refused_by_name(tmp_path: Path, monkeypatch):
    path = tiny_of(monkeypatch, tmp_path, K_MIX | {"ffn_up": "Q8_0"})
    with pytest.raises(ValueError, match="are stored as Q4_K and Q8_0; one format is accepted for"):
        load_for_cpu(path)
    path = tiny_of(monkeypatch, tmp_path, K_MIX | {"attn_q": "BF16"})
    with pytest.raises(
        ValueError, match="q_proj.weight is stored as BF16; Q4_0.* Q5_K are accepted"
    ):
        load_for_cpu(path)


def test_packed_weights_are_kept_and_mapped(
    smollm2_text: TextModel, smollm2_path: Path, tmp_path: Path, monkeypatch
):
    first = load_for_cpu(str(smollm2_path), cache_dir=tmp_path)
    monkeypatch.setattr(ops, "pack", None)  # the second time nothing is packed
    second = load_for_cpu(str(smollm2_path), cache_dir=tmp_path)
    for ours, theirs in zip(first.layers, second.layers, strict=True):
        for a, b in zip(ours.matrices, theirs.matrices, strict=True):
            assert torch.equal(a.data, b.data) and a[1:] == b[1:]
    monkeypatch.undo()
    fresh = load_for_cpu(str(smollm2_path))
    assert torch.equal(fresh.embed.data, second.embed.data)
    [kept] = tmp_path.glob("*.weights")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not what was written there"):
        load_for_cpu(str(smollm2_path), cache_dir=tmp_path)


def test_the_default_model_answers_as_the_reference_does(
    smollm2: Decoder, smollm2_text: TextModel, smollm2_path: Path
):
    packed = load_for_cpu(str(smollm2_path))
    for words in PROMPTS:
        prompt = prompt_ids(smollm2_text, words)
        wanted, logits = greedy(smollm2, prompt, 24)
        made, ours = greedy(packed, prompt, 24)
        assert made == wanted, words
        assert (ours - logits).abs().max() < 2e-2
    assert replace(packed.config) == smollm2.config
    packed.activations = "float32"
    prompt = prompt_ids(smollm2_text, PROMPTS[0])
    wanted, logits = greedy(smollm2, prompt, 8)
    made, ours = greedy(packed, prompt, 8)
    assert made == wanted and (ours - logits).abs().max() < 1e-3
