"""Tokenizers built from GGUF metadata, against those that transformers builds from it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from models.load import load_text
from models.tokenizer import Tokenizer
from tests.models.texts import texts
from tests.models.tiny import write_byte_level, write_sentencepiece


def transformers_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe", "qwen2"])
def test_byte_level_splits_equal_transformers(tmp_path: Path, pre: str):
    path = write_byte_level(tmp_path / "tiny.gguf", pre=pre)
    ours, oracle = load_text(str(path)).tokenizer, transformers_tokenizer(path)
    if pre == "qwen2":  # transformers leaves out the normaliser of Qwen's own tokenizer.json
        oracle.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    # transformers' GPT-2 class brings an <|endoftext|> of its own, which the file does not have.
    for text in [*texts(120, without=("special",)), "hello world  hellohello", "12345 123"]:
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False), text


def test_sentencepiece_equals_transformers(tmp_path: Path):
    path = write_sentencepiece(tmp_path / "tiny.gguf")
    ours, oracle = load_text(str(path)).tokenizer, transformers_tokenizer(path)
    for text in [*texts(120), "the  the in there", " lead", "thé", "trail "]:
        ids = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True), text


def test_special_tokens_are_parsed_but_never_added(tmp_path: Path):
    ours = load_text(str(write_byte_level(tmp_path / "tiny.gguf"))).tokenizer
    assert ours.encode("<|im_start|>hello<|im_end|>")[::2] == [0, 1]
    assert ours.encode("") == []
    assert ours.decode(ours.encode("<|im_start|>hello")) == "hello"
    assert ours.decode(ours.encode("<|im_start|>hello"), skip_special=False) == "<|im_start|>hello"
    assert (ours.bos_token_id, ours.eos_token_ids, ours.prompt_prefix) == (0, (1,), ())


def test_a_sentencepiece_model_wants_its_bos_before_a_raw_prompt(tmp_path: Path):
    ours = load_text(str(write_sentencepiece(tmp_path / "tiny.gguf"))).tokenizer
    assert ours.prompt_prefix == (1,)


def test_ids_beyond_the_vocabulary_are_dropped(tmp_path: Path):
    ours = load_text(str(write_byte_level(tmp_path / "tiny.gguf"))).tokenizer
    assert ours.decode([*ours.encode("hello"), ours.vocab_size + 7]) == "hello"


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path: Path):
    path = write_byte_level(tmp_path / "tiny.gguf", pre="klingon")
    with pytest.raises(ValueError, match="klingon.*smollm.*qwen2"):
        load_text(str(path))


def test_a_decoder_that_cannot_be_streamed_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="here: .*WordPiece.*byte-level BPE"):
        Tokenizer(backend, source="here", bos_token_id=None, eos_token_ids=(), special_texts={})


def test_text_parts_load_without_torch_or_transformers(tiny_gguf: Path):
    code = (
        "import sys; from models.load import load_text; import models.detokenize\n"
        f"text = load_text({str(tiny_gguf)!r}); text.tokenizer.encode('hello')\n"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
