"""The decoder of a GPU: against the float32 decoder over the same numbers, in every format of
weights and of caches. Where there is a GPU it runs there, else on the ops' torch references."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.batch import TokenBatch
from models.config import ModelConfig
from models.decoder import Decoder
from models.device.decoder import DeviceDecoder, LayerWeights
from models.device.matrix import W4, W8, Plain
from models.device.ops import ops_of
from models.device.step import Cache
from tests.models.device_models import (
    CONFIG,
    DEVICE,
    LARGER,
    RandomSource,
    cache_of,
    on_device,
    oracle,
)

PAGE_TOKENS = 4
MIXED = {"v_proj": "Q6_K", "down_proj": "Q6_K", "embed": "Q6_K"}
# How far logits may be from the oracle's, and from the least that rounding costs.
FAR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KV_FAR = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2, "int8": 4e-2, "int4": 0.35}


class Run:
    """Sequences of one decoder over scattered pages, told apart by number."""

    def __init__(self, decoder: Any, count: int, tokens: int, cache: Any) -> None:
        self.decoder, self.cache = decoder, cache
        each = -(-tokens // PAGE_TOKENS)
        order = torch.randperm(count * each, generator=torch.Generator().manual_seed(count))
        self.tables = order.view(count, each)
        self.lengths = [0] * count

    def step(self, work: list[tuple[int, list[int]]]) -> torch.Tensor:
        """Logits [all rows, vocab], on the CPU, after giving each (sequence, ids) its tokens."""
        with torch.inference_mode():
            logits: torch.Tensor = self.decoder(self.batch(work), self.cache)
        return logits.cpu()

    def batch(self, work: list[tuple[int, list[int]]]) -> TokenBatch:
        ids, places, slots, starts, contexts = [], [], [], [0], []
        for number, more in work:
            before = self.lengths[number]
            self.lengths[number] = before + len(more)
            place = torch.arange(before, before + len(more))
            table = self.tables[number]
            ids += more
            places.append(place)
            slots.append(table[place // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS)
            starts.append(len(ids))
            contexts.append(self.lengths[number])
        tables = self.tables[[number for number, _ in work]]
        every = torch.arange(len(ids))
        return TokenBatch(
            torch.tensor(ids), torch.cat(places), torch.cat(slots), tuple(starts), tuple(contexts),
            tables, every,
        )  # fmt: skip


def ids(count: int, seed: int = 0) -> list[int]:
    return [(17 * n + 5 * seed + n * n) % CONFIG.vocab for n in range(count)]


# A prompt beside another, a chunk beside a token, tokens alone, a chunk alone.
WORK: list[list[tuple[int, list[int]]]] = [
    [(0, ids(9)), (1, ids(6, 1))],
    [(1, ids(1, 2)), (0, ids(4, 3)), (2, ids(5, 6))],
    [(0, ids(1, 4)), (2, ids(1, 7)), (1, ids(1, 5))],
    [(2, ids(7, 8))],
]


def apart(ours: DeviceDecoder, theirs: Decoder, kv_format: str) -> float:
    """The root mean square of the distance of logits, relative to theirs: the worst of WORK."""
    config = ours.config
    pages = 3 * (24 // PAGE_TOKENS)
    one = Run(ours, 3, 24, cache_of(config, pages, PAGE_TOKENS, kv_format))
    shape = (config.layers, 2, pages, PAGE_TOKENS, config.kv_heads, config.head_dim)
    two = Run(theirs, 3, 24, torch.full(shape, 1e4))
    worst = 0.0
    for work in WORK:
        got, wanted = one.step(work), two.step(work)
        worst = max(worst, distance(got, wanted))
    return worst


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of what is wanted."""
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def twins(
    config: ModelConfig, form: str, dtype: torch.dtype = torch.float32
) -> tuple[DeviceDecoder, Decoder]:
    source = RandomSource(config, "Q4_K", MIXED) if form == "mixed" else RandomSource(config, form)
    return on_device(source, config, dtype), oracle(source, config)


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", "mixed", "BF16", "F32"])
@pytest.mark.parametrize("biases", [False, True])
def test_logits_are_the_float32_decoder_s(form: str, biases: bool):
    config = replace(LARGER if form == "mixed" else CONFIG, qkv_bias=biases, out_bias=biases)
    assert apart(*twins(config, form), "float32") < FAR[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["Q4_1", "mixed"])
def test_halves_are_as_near_as_halves_are(form: str, dtype: torch.dtype):
    config = LARGER if form == "mixed" else CONFIG
    kept = str(dtype).removeprefix("torch.")
    assert FAR[torch.float32] < apart(*twins(config, form, dtype), kept) < FAR[dtype]


@pytest.mark.parametrize("kv_format", KV_FAR)
def test_every_form_of_cache(kv_format: str):
    """Only the cache is rounded here, and is: a coarser one is further away."""
    finer = [far for far in KV_FAR.values() if far < KV_FAR[kv_format]]
    least = max(finer, default=0.0) / 20
    assert least < apart(*twins(CONFIG, "Q8_0"), kv_format) < KV_FAR[kv_format]


# A GPU sums another number of rows in another order, so that a key between two levels may end in
# either; keys that are not rounded at all would be as far away as KV_FAR says of the format.
CUT_FAR = {"float32": 2e-5, "int8": 5e-3, "int4": 6e-2}


@pytest.mark.parametrize("kv_format", CUT_FAR)
def test_chunks_and_company_change_little(kv_format: str):
    """How a prompt is cut does not change what is attended to: with small caches, too."""
    ours, _ = twins(CONFIG, "Q4_0")
    whole = Run(ours, 1, 24, cache_of(CONFIG, 6, PAGE_TOKENS, kv_format)).step([(0, ids(20))])
    for cut in (1, 4, 7, 19):
        run = Run(ours, 2, 24, cache_of(CONFIG, 12, PAGE_TOKENS, kv_format))
        parts = [run.step([(1, ids(3, 9)), (0, ids(20)[:cut])])[3:]]
        parts += [run.step([(0, [token]), (1, [3])])[:1] for token in ids(20)[cut:24]]
        assert distance(torch.cat(parts), whole) < CUT_FAR[kv_format], cut


def test_keys_that_are_not_rounded_would_be_seen():
    """A prompt that attended to its own keys as they are would depend on how it is cut."""
    ours, _ = twins(CONFIG, "Q4_0")
    whole = Run(ours, 1, 24, cache_of(CONFIG, 6, PAGE_TOKENS, "int4")).step([(0, ids(20))])
    exact = Run(ours, 1, 24, cache_of(CONFIG, 6, PAGE_TOKENS)).step([(0, ids(20))])
    assert distance(exact, whole) > CUT_FAR["int4"]


def test_a_tied_head_is_the_embedding_and_another_is_its_own():
    ours, theirs = twins(replace(CONFIG, tied_head=False), "Q8_0")
    assert ours.head is not ours.embed
    assert apart(ours, theirs, "float32") < FAR[torch.float32]
    tied, _ = twins(CONFIG, "Q8_0")
    assert tied.head is tied.embed


def test_weights_stay_as_quantised_as_they_are():
    """And what has one kind is one matrix."""
    ours, _ = twins(LARGER, "mixed")
    layer = ours.layers[0]
    assert [type(part) for part in layer.qkv] == [W4, W8]
    assert layer.qkv[0][0].shape[0] == (LARGER.heads + LARGER.kv_heads) * LARGER.head_dim
    assert [type(part) for part in layer.gate_up] == [W4]
    assert type(layer.down) is W8 and type(ours.embed) is W8
    plain, _ = twins(CONFIG, "F32")
    assert [type(part) for part in plain.layers[0].qkv] == [Plain]


def _swapped_scales(decoder: DeviceDecoder) -> None:
    weight = decoder.layers[1].down
    assert isinstance(weight, W4)
    weight.scales.copy_(weight.scales.flip(0))


def _forgotten_bias(decoder: DeviceDecoder) -> None:
    decoder.layers[0] = decoder.layers[0]._replace(qkv_bias=None)


def _norms_changed_over(decoder: DeviceDecoder) -> None:
    layer: LayerWeights = decoder.layers[0]
    decoder.layers[0] = layer._replace(
        mixer_norm=layer.feedforward_norm, feedforward_norm=layer.mixer_norm
    )


@pytest.mark.parametrize("change", [_swapped_scales, _forgotten_bias, _norms_changed_over])
def test_a_wrong_weight_is_seen(change: Any):
    ours, theirs = twins(replace(CONFIG, qkv_bias=True), "Q4_1")
    change(ours)
    assert apart(ours, theirs, "float32") > 50 * FAR[torch.float32]


@pytest.mark.parametrize("wrong", ["table", "slot", "context"])
def test_a_wrong_place_is_seen(wrong: str):
    """A row of another sequence's pages, keys written elsewhere, one token less."""
    ours, _ = twins(CONFIG, "Q4_1")
    runs = [Run(ours, 2, 24, cache_of(CONFIG, 12, PAGE_TOKENS)) for _ in range(2)]
    for run in runs:
        run.step([(0, ids(9)), (1, ids(9, 1))])
    batch = runs[0].batch([(0, [5]), (1, [7])])
    changes: dict[str, dict[str, Any]] = {
        "table": {"page_tables": batch.page_tables.flip(0)},
        "slot": {"slots": batch.slots.flip(0)},
        "context": {"context_tokens": (9, 9)},
    }
    cache = runs[0].cache
    twin = Cache(cache.numbers.clone())
    with torch.inference_mode():
        right = ours(batch, cache).cpu()
        other = ours(replace(batch, **changes[wrong]), twin).cpu()
    assert (right - other).abs().max() > 1e-2


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU, and it runs there anyhow")
@pytest.mark.parametrize("kv_format", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_launchers_in_the_interpreter(kv_format: str, monkeypatch: pytest.MonkeyPatch):
    """Triton's own kernels, as a GPU would launch them: prompts, and a token beside a chunk."""
    pytest.importorskip("triton")
    from kernels.triton.verify.repair import repaired
    from tests.kernels.triton.conformance import watched

    monkeypatch.setattr(f"{__name__}.WORK", [[(0, ids(5))], [(0, ids(1)), (1, ids(3, 1))]])
    config = replace(CONFIG, layers=1, heads=2, kv_heads=1, hidden=32, ff=32)
    source = RandomSource(config, "Q4_1", {"v_proj": "Q8_0"})
    launched = on_device(source, config, ops=ops_of("kernels.triton"))
    with repaired(), watched("sm_90"):
        assert apart(launched, oracle(source, config), kv_format) < KV_FAR[kv_format]
