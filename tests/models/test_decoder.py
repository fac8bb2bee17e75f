"""The decoder alone: one prompt, many ways of cutting it into steps, the same logits."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import ModelConfig
from models.decoder import Decoder
from models.load import load_model
from tests.models.sequences import Sequences

IDS = torch.randint(0, 260, (250,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def decoder(tiny_gguf: Path) -> Decoder:
    return load_model(str(tiny_gguf))


@pytest.fixture(scope="module")
def whole(decoder: Decoder) -> torch.Tensor:
    return Sequences(decoder, 1, 256).step([(0, IDS)])


@given(cuts=st.lists(st.integers(1, 249), max_size=12), page_tokens=st.sampled_from([4, 16]))
@settings(max_examples=15)
def test_chunks_equal_one_prefill(
    decoder: Decoder, whole: torch.Tensor, cuts: list[int], page_tokens: int
):
    sequences = Sequences(decoder, 1, 256, page_tokens)
    bounds = [0, *sorted(set(cuts)), len(IDS)]
    pairs = zip(bounds, bounds[1:], strict=False)
    pieces = [sequences.step([(0, IDS[start:stop])]) for start, stop in pairs]
    assert torch.equal(torch.cat(pieces), whole)


def test_one_token_at_a_time_equals_one_prefill(decoder: Decoder, whole: torch.Tensor):
    sequences = Sequences(decoder, 1, 256)
    assert torch.equal(torch.cat([sequences.step([(0, [token])]) for token in IDS]), whole)


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_a_mixed_batch_equals_each_sequence_alone(decoder: Decoder, seed: int):
    """Several sequences move on by random amounts per step, some not at all."""
    source = random.Random(seed)
    prompts = [IDS[:60], IDS[60:90], IDS[90:200], IDS[200:203]]
    alone = [Sequences(decoder, 1, 256).step([(0, prompt)]) for prompt in prompts]
    together = Sequences(decoder, len(prompts), 128, seed=1)
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(together.lengths[number] < len(ids) for number, ids in enumerate(prompts)):
        counts = [source.choice([0, 1, 1, 3, 40]) for _ in prompts]
        pieces = [
            (number, ids[together.lengths[number] :][: counts[number]])
            for number, ids in enumerate(prompts)
        ]
        work = [(number, piece) for number, piece in pieces if piece]
        logits = together.step(work) if work else torch.empty(0, decoder.config.vocab)
        for number, piece in work:
            rows[number].append(logits[: len(piece)])
            logits = logits[len(piece) :]
    for wanted, found in zip(alone, rows, strict=True):
        assert torch.equal(torch.cat(found), wanted)


def test_only_the_wanted_rows_come_back(decoder: Decoder, whole: torch.Tensor):
    from models.batch import TokenBatch

    sequences = Sequences(decoder, 1, 256)
    place = torch.arange(20)
    slots = sequences.tables[0][place // 16] * 16 + place % 16
    ids, rows = torch.tensor(IDS[:20]), torch.tensor([19, 3])
    batch = TokenBatch(ids, place, slots, (0, 20), (20,), sequences.tables, rows)
    logits = decoder(batch, sequences.kv)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, whole[[19, 3]])


def test_keys_and_values_go_where_the_slots_say(decoder: Decoder):
    sequences = Sequences(decoder, 2, 64)
    untouched = sequences.kv.clone()
    sequences.step([(1, IDS[:20])])
    changed = (sequences.kv != untouched).flatten(4).all(-1).all(0).all(0)
    pages = set(sequences.tables[1][:2].tolist())
    assert {int(page) for page in changed.any(-1).nonzero()} == pages
    assert int(changed.sum()) == 20


def test_bfloat16_is_close_and_is_bfloat16(tiny_gguf: Path, whole: torch.Tensor):
    decoder = load_model(str(tiny_gguf), dtype="bfloat16")
    assert decoder.dtype == torch.bfloat16
    logits = Sequences(decoder, 1, 256).step([(0, IDS)])
    assert logits.dtype == torch.float32
    assert 0 < (logits - whole).abs().mean() < 0.1 * whole.abs().mean()


def test_other_dtypes_are_refused(tiny_gguf: Path):
    with pytest.raises(ValueError, match="float16.*float32 and bfloat16"):
        load_model(str(tiny_gguf), dtype="float16")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"layers": 0}, "layers"),
        ({"head_dim": 15}, "even"),
        ({"hidden": 1 << 40}, "hidden"),
        ({"rms_eps": float("nan")}, "rms_eps"),
    ],
)
def test_impossible_shapes_are_refused(decoder: Decoder, change: dict[str, int], word: str):
    shape = {key: getattr(decoder.config, key) for key in decoder.config.__dataclass_fields__}
    with pytest.raises(ValueError, match=word):
        ModelConfig(**shape | change)


@pytest.mark.parametrize("key", ["mixer", "feedforward"])
def test_unknown_parts_are_refused_with_the_known_ones(decoder: Decoder, key: str):
    shape = {key: getattr(decoder.config, key) for key in decoder.config.__dataclass_fields__}
    with pytest.raises(ValueError, match="accepted are (attention|swiglu)"):
        Decoder(ModelConfig(**shape | {key: "telepathy"}))


def test_kv_bytes_of_a_token(decoder: Decoder):
    kv = Sequences(decoder, 1, 16).kv
    assert decoder.config.kv_token_bytes(4) * 16 == kv.numel() * kv.element_size()
