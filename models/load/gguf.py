"""The meaning of a GGUF file: which decoder it describes and which tensor is which weight.

Accepts the architectures "llama" (Llama, Mistral, SmolLM) and "qwen2". Imports no torch.
Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass
from typing import Any

from kernels.rope import RopeConfig
from models.chat_template import ChatTemplate
from models.config import ModelConfig
from models.load.fields import Fields
from models.load.gguf_file import GGUFFile
from models.load.gguf_tokenizer import build_tokenizer
from models.load.text import TextModel


@dataclass(frozen=True)
class Architecture:
    """What differs between accepted architectures: whether query and key rows are stored
    interleaved (as rotary pairs) rather than half-split."""

    interleaved: bool


ARCHITECTURES = {"llama": Architecture(interleaved=True), "qwen2": Architecture(interleaved=False)}

# GGUF's name of each weight of a layer, by the name that transformers gives it.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def architecture(file: GGUFFile) -> Architecture:
    """The file's architecture. ValueError when it is not one of ours."""
    name = _fields(file).text("general.architecture", "")
    if name not in ARCHITECTURES:
        known = " and ".join(repr(known) for known in ARCHITECTURES)
        raise ValueError(f"{file.path}: architecture {name!r} is not accepted; {known} are.")
    return ARCHITECTURES[name]


def stored_name(name: str) -> str:
    """transformers' name of a weight ("model.layers.3.mlp.up_proj.weight") -> GGUF's."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def read_config(file: GGUFFile) -> ModelConfig:
    """The decoder that the metadata describes. ValueError when a key is missing or wrong."""
    architecture(file)
    fields = _fields(file)
    prefix = fields.text("general.architecture")
    if fields.integer(f"{prefix}.expert_count", 0):
        raise ValueError(f"{file.path}: expert layers are not accepted; dense feed-forwards are.")
    heads = fields.integer(f"{prefix}.attention.head_count")
    hidden = fields.integer(f"{prefix}.embedding_length")
    head_dim = fields.integer(f"{prefix}.attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(f"{prefix}.{key}", head_dim) != head_dim:
            raise fields.refuse(f"{prefix}.{key}", f"the head size {head_dim}")
    try:
        return ModelConfig(
            name=fields.text("general.name", file.path.stem),
            layers=fields.integer(f"{prefix}.block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=fields.integer(f"{prefix}.attention.head_count_kv", heads),
            head_dim=head_dim,
            ff=fields.integer(f"{prefix}.feed_forward_length"),
            vocab=_vocab(file),
            context_tokens=fields.integer(f"{prefix}.context_length"),
            rms_eps=fields.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
            rope=_rope(file, fields, prefix, head_dim),
            tied_head="output.weight" not in file.tensors,
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            out_bias="blk.0.attn_output.bias" in file.tensors,
            bos_token_id=_optional(fields, "tokenizer.ggml.bos_token_id"),
            eos_token_ids=_ends(fields),
        )
    except ValueError as error:
        if str(error).startswith(str(file.path)):
            raise
        raise ValueError(f"{file.path}: {error}") from None


def read_text(file: GGUFFile) -> TextModel:
    """Configuration, tokenizer and chat template. ValueError when any is missing or foreign."""
    config = read_config(file)
    tokenizer = build_tokenizer(str(file.path), file.metadata, config)
    fields = _fields(file)
    if "tokenizer.chat_template" not in fields:
        return TextModel(config, tokenizer, None)
    template = ChatTemplate(
        fields.text("tokenizer.chat_template"), tokenizer.special_texts, source=str(file.path)
    )
    return TextModel(config, tokenizer, template)


def _fields(file: GGUFFile) -> Fields:
    return Fields(str(file.path), file.metadata)


def _vocab(file: GGUFFile) -> int:
    """Rows of the embedding, which may exceed the tokens of the tokenizer (padding)."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing or not a matrix.")
    return embedding.shape[0]


def _optional(fields: Fields, key: str) -> int | None:
    return fields.integer(key) if key in fields else None


def _ends(fields: Fields) -> tuple[int, ...]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ends = [_optional(fields, f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def _rope(file: GGUFFile, fields: Fields, prefix: str, head_dim: int) -> RopeConfig:
    theta = fields.number(f"{prefix}.rope.freq_base", 10000.0)
    if "rope_freqs.weight" in file.tensors:
        return RopeConfig(theta=theta, kind="factors", factors=_factors(file, head_dim))
    kind = fields.text(f"{prefix}.rope.scaling.type", "none")
    # The older key is a linear factor of its own.
    old_factor = fields.number(f"{prefix}.rope.scale_linear", 1.0)
    factor = fields.number(f"{prefix}.rope.scaling.factor", old_factor)
    if kind == "linear" or (kind == "none" and f"{prefix}.rope.scale_linear" in fields):
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind == "yarn":
        context = fields.integer(f"{prefix}.rope.scaling.original_context_length")
        return RopeConfig(theta=theta, kind="yarn", factor=factor, original_context_tokens=context)
    if kind == "none":
        return RopeConfig(theta=theta)
    raise fields.refuse(f"{prefix}.rope.scaling.type", "none, linear or yarn")


def _factors(file: GGUFFile, head_dim: int) -> tuple[float, ...]:
    stored = file.tensors["rope_freqs.weight"]
    if stored.format.name != "F32" or stored.shape != (head_dim // 2,):
        raise ValueError(f"{file.path}: rope_freqs.weight must be {head_dim // 2} F32 numbers.")
    values: tuple[Any, ...] = struct.unpack(
        f"<{head_dim // 2}f", file.stored_bytes("rope_freqs.weight")
    )
    return values
