"""Streaming: pieces add up to the whole, whatever the ids, and no piece holds half a character."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.detokenize import Detokenizer
from models.load import TextModel, load_text
from models.tokenizer import Tokenizer
from tests.models.texts import texts
from tests.models.tiny import sentencepiece_tokens, write_byte_level, write_sentencepiece


@pytest.fixture(scope="module", params=["bytes", "pieces", "pieces-without-prefix"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    path = tmp_path_factory.mktemp("stream") / "tiny.gguf"
    if request.param == "bytes":
        return load_text(str(write_byte_level(path))).tokenizer
    prefix = request.param == "pieces"
    return load_text(str(write_sentencepiece(path, space_prefix=prefix))).tokenizer


def streamed(tokenizer: Tokenizer, pieces: list[list[int]]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [stream.push(piece) for piece in pieces] + [stream.flush()]


@given(pieces=st.lists(st.lists(st.integers(0, 310), max_size=6), max_size=30))
@settings(max_examples=400)
def test_random_ids_add_up(tokenizer: Tokenizer, pieces: list[list[int]]):
    """Bytes in any order, special tokens, ids beyond the vocabulary."""
    whole = [number for piece in pieces for number in piece]
    assert "".join(streamed(tokenizer, pieces)) == tokenizer.decode(whole)


@pytest.mark.parametrize("text", texts(60))
def test_text_one_token_at_a_time(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    parts = streamed(tokenizer, [[number] for number in ids])
    assert "".join(parts) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in part for part in parts)


def test_a_split_character_waits_for_its_last_byte(tmp_path: Path):
    tokenizer = load_text(str(write_byte_level(tmp_path / "tiny.gguf"))).tokenizer
    ids = tokenizer.encode("é😀")
    assert len(ids) == 6
    assert streamed(tokenizer, [[number] for number in ids]) == ["", "é", "", "", "", "😀", ""]
    assert streamed(tokenizer, [ids[:4]]) == ["é", "\ufffd"]


def test_byte_tokens_wait_for_the_end_of_their_run(tmp_path: Path):
    """SentencePiece's decoder judges a run of byte tokens as one, so it cannot be shown early."""
    tokenizer = load_text(str(write_sentencepiece(tmp_path / "tiny.gguf"))).tokenizer
    letter = sentencepiece_tokens()[0].index("a")
    euro = [3 + byte for byte in "€".encode()]
    assert streamed(tokenizer, [[*euro], [letter]]) == ["", "€a", ""]
    assert streamed(tokenizer, [euro[:2], [letter]]) == ["", "\ufffd\ufffda", ""]


@given(data=st.data())
@settings(max_examples=200)
def test_the_real_vocabulary(smollm2_text: TextModel, data: st.DataObject):
    tokenizer = smollm2_text.tokenizer
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    parts = streamed(tokenizer, [[number] for number in ids])
    assert "".join(parts) == tokenizer.decode(ids)
