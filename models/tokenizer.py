"""Text to token ids and back: a checked wrapper around the `tokenizers` library.

Built by the loaders (`load/gguf_tokenizer.py`, `load/folder.py`), used by the HTTP edge and the
engine. Only decoders whose output can be streamed exactly are accepted, see `DecoderForm`.
Imports neither torch nor transformers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import tokenizers


class DecoderForm(NamedTuple):
    """How tokens become text. kind "bytes": every character stands for a byte (GPT-2);
    "pieces": a space mark is replaced and <0xNN> tokens are bytes (SentencePiece), and strip
    leading spaces of the whole text are dropped."""

    kind: Literal["bytes", "pieces"]
    mark: str = ""
    strip: int = 0


class Tokenizer:
    """One model's tokenizer. Immutable; safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        source: str,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        special_texts: Mapping[str, str],
        prompt_prefix: tuple[int, ...] = (),
    ) -> None:
        """backend is taken over. special_texts: what a chat template may call bos_token,
        eos_token and so on; prompt_prefix: ids the model expects before a raw prompt (BOS, or
        nothing). ValueError naming `source` when the decoder cannot be streamed."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.form = _decoder_form(backend, source)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.special_texts = dict(special_texts)
        self.prompt_prefix = prompt_prefix
        added = backend.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        self.special_ids = frozenset(
            number for number, token in added.items() if token.content in special
        )
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocab_size = largest + 1

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written out in the text are parsed, none are added."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary are
        dropped."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def to_json(self) -> str:
        """The content of a tokenizer.json that `models/load/folder.py` and others read."""
        text: str = self._backend.to_str()
        return text

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id, None when there is no such id."""
        spelling: str | None = self._backend.id_to_token(token_id)
        return spelling

    def token_id(self, token: str) -> int | None:
        """The id of a spelling, None when there is no such token."""
        number: int | None = self._backend.token_to_id(token)
        return number


def _decoder_form(backend: tokenizers.Tokenizer, source: str) -> DecoderForm:
    """ValueError unless the decoder is ByteLevel, or Replace, ByteFallback, Fuse and at most one
    Strip of leading spaces."""
    decoder = backend.decoder
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {}
    if state.get("type") == "ByteLevel":
        return DecoderForm("bytes")
    steps = state.get("decoders", [])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return DecoderForm("bytes")
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        mark, space = steps[0]["pattern"].get("String"), steps[0]["content"]
        unstripped: dict[str, Any] = {"content": " ", "start": 0, "stop": 0}
        strip = steps[3] if kinds[3:] else unstripped
        if mark and space == " " and strip["content"] == " " and strip["stop"] == 0:
            return DecoderForm("pieces", mark, strip["start"])
    found = state.get("type", "none")
    raise ValueError(
        f"{source}: the tokenizer's decoder ({found}) is not accepted; byte-level BPE and "
        "SentencePiece with byte fallback are."
    )
