"""The metadata of a GGUF file for a model that comes from elsewhere: shape, rotation, text side."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from kernels.reference.rope import inverse_frequencies
from kernels.rope import RopeConfig
from models.config import ModelConfig
from models.load.text import TextModel
from models.tokenizer import Tokenizer

ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Keys for tokens that end an answer, in order."""
IDS = {
    "bos_token": "bos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
KIND = gguf.GGUFValueType


class Entry(NamedTuple):
    """A line of metadata. kind: a gguf.GGUFValueType; of: that of an array's items."""

    key: str
    value: Any
    kind: Any
    of: Any = None


def describe(name: str, architecture: str, text: TextModel) -> list[Entry]:
    """All lines for a model of this architecture. ValueError naming the model for what GGUF has no
    key for."""
    config = text.config
    entries = [Entry("general.name", config.name, KIND.STRING)]
    for key, value in _shape(config).items():
        entries.append(Entry(f"{architecture}.{key}", value, KIND.UINT32))
    eps = f"{architecture}.attention.layer_norm_rms_epsilon"
    entries.append(Entry(eps, config.rms_eps, KIND.FLOAT32))
    entries += [Entry(f"{architecture}.rope.{e.key}", *e[1:]) for e in _rotation(name, config)]
    return entries + list(_text(name, text))


def _shape(config: ModelConfig) -> dict[str, int]:
    return {
        "block_count": config.layers,
        "context_length": config.context_tokens,
        "embedding_length": config.hidden,
        "feed_forward_length": config.ff,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab,
    }


def _rotation(name: str, config: ModelConfig) -> Iterator[Entry]:
    """Keys below `rope.`; llama3's frequencies are a tensor, see `rotary_factors`."""
    rope = config.rope
    yield Entry("freq_base", rope.theta, KIND.FLOAT32)
    if rope.kind in ("default", "llama3"):
        return
    context = rope.original_context_tokens
    plain = RopeConfig(rope.theta, rope.kind, rope.factor, context)
    if rope.kind not in ("linear", "yarn") or rope != plain:
        raise ValueError(
            f"{name}: its rotary positions ({rope.kind}) cannot be said in a GGUF file; default, "
            "linear, llama3 and yarn with only a factor and a length are accepted."
        )
    yield Entry("scaling.type", rope.kind, KIND.STRING)
    yield Entry("scaling.factor", rope.factor, KIND.FLOAT32)
    if rope.kind == "yarn":
        yield Entry("scaling.original_context_length", context, KIND.UINT32)


def rotary_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """What llama3's scaling divides each of head_dim / 2 frequencies by; None for other kinds."""
    if config.rope.kind != "llama3":
        return None
    plain = inverse_frequencies(RopeConfig(config.rope.theta), config.head_dim).inverse
    scaled = inverse_frequencies(config.rope, config.head_dim).inverse
    factors: NDArray[np.float32] = (plain / scaled).numpy()
    return factors


def _ends(tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer, first the one that chat templates call eos_token."""
    named = tokenizer.token_id(tokenizer.special_texts.get("eos_token", ""))
    return sorted(tokenizer.eos_token_ids, key=lambda number: number != named)


def _text(name: str, text: TextModel) -> Iterator[Entry]:
    tokenizer = text.tokenizer
    yield Entry("tokenizer.huggingface.json", tokenizer.to_json(), KIND.STRING)
    ends = _ends(tokenizer)
    if len(ends) > len(ENDS):
        raise ValueError(
            f"{name} has {len(ends)} tokens that end an answer; a GGUF file names {len(ENDS)}."
        )
    ids = {
        key: tokenizer.token_id(tokenizer.special_texts.get(own, "")) for own, key in IDS.items()
    }
    if tokenizer.bos_token_id is not None:
        ids["bos_token_id"] = tokenizer.bos_token_id
    ids |= dict(zip(ENDS, ends, strict=False))
    for key, number in ids.items():
        if number is not None:
            yield Entry(f"tokenizer.ggml.{key}", number, KIND.UINT32)
    if text.chat_template is not None:
        yield Entry("tokenizer.chat_template", text.chat_template.text, KIND.STRING)
