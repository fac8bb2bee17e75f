"""The meaning of a Hugging Face folder: config.json, tokenizer.json, a chat template, weights.

Accepts LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM with dense attention. Weights
themselves are in `safetensors_weights.py`; this file imports no torch.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.rope import RopeConfig
from models.chat_template import ChatTemplate
from models.config import ModelConfig
from models.load.fields import Fields
from models.load.json_tokenizer import build, read_backend
from models.load.text import TextModel
from models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from models.load.safetensors_weights import SafetensorsWeights

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def open_folder(path: Path) -> "tuple[ModelConfig, SafetensorsWeights]":
    """Configuration and weights of a folder. ValueError as for the parts."""
    from models.load.safetensors_weights import SafetensorsWeights

    return read_config(path), SafetensorsWeights(path)


def read_json(path: Path) -> Fields:
    """A JSON object from a file. ValueError when it is missing or not one."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; a Hugging Face folder needs one.")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return Fields(str(path), values)


def read_config(path: Path) -> ModelConfig:
    """The decoder that config.json describes. ValueError when a key is missing, wrong or asks
    for something we do not compute."""
    fields = read_json(path / "config.json")
    kind = _architecture(fields)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", hidden // max(heads, 1))
    biased = fields.flag("attention_bias", False)
    try:
        return ModelConfig(
            name=path.name,
            layers=fields.integer("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            ff=fields.integer("intermediate_size"),
            vocab=fields.integer("vocab_size"),
            context_tokens=fields.integer("max_position_embeddings"),
            rms_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields),
            tied_head=fields.flag("tie_word_embeddings", False),
            qkv_bias=biased or kind == "Qwen2ForCausalLM",
            out_bias=biased and kind != "Qwen2ForCausalLM",
            bos_token_id=fields.integer("bos_token_id") if "bos_token_id" in fields else None,
            eos_token_ids=_ends(path, fields),
        )
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{fields.source}: {error}") from None


def _architecture(fields: Fields) -> str:
    names = fields.values.get("architectures")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise fields.refuse("architectures", f"a list of one of {known}")
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.refuse("hidden_act", "'silu'")
    if fields.flag("mlp_bias", False):
        raise fields.refuse("mlp_bias", "false")
    windowed = fields.flag("use_sliding_window", names[0] == "MistralForCausalLM")
    if windowed and "sliding_window" in fields:
        raise fields.refuse("sliding_window", "null (full attention)")
    if "quantization_config" in fields:
        raise fields.refuse("quantization_config", "absent (plain weights)")
    return str(names[0])


def _rope(fields: Fields) -> RopeConfig:
    """Both spellings: rope_theta beside rope_scaling, and the newer rope_parameters."""
    found = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise fields.refuse("rope_scaling", "an object")
    rope = Fields(f"{fields.source}: rope", found)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.refuse("partial_rotary_factor", "1.0")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=rope.number("factor"))
    # Where the original length is not stated, it is the model's.
    default_context = fields.integer("max_position_embeddings")
    context = rope.integer("original_max_position_embeddings", default_context)
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=rope.number("factor"),
            original_context_tokens=context,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "yarn" and "mscale" not in rope:
        given = "attention_factor" in rope
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=rope.number("factor"),
            original_context_tokens=context,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=rope.number("attention_factor") if given else None,
            truncate=rope.flag("truncate", True),
        )
    raise rope.refuse("rope_type", "default, linear, llama3 or yarn (without mscale)")


def _ends(path: Path, fields: Fields) -> tuple[int, ...]:
    """Tokens that end an answer; generation_config.json knows better than config.json."""
    if (path / "generation_config.json").is_file():
        generation = read_json(path / "generation_config.json")
        if "eos_token_id" in generation:
            fields = generation
    value = fields.values.get("eos_token_id")
    ends = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(end) is int for end in ends):
        raise fields.refuse("eos_token_id", "a whole number or a list of them")
    return tuple(ends)


def read_text(path: Path) -> TextModel:
    """Configuration, tokenizer and chat template of a folder."""
    config = read_config(path)
    settings_path = path / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else Fields(str(path), {})
    texts = _special_texts(settings)
    tokenizer = _tokenizer(path, config, texts)
    source = _template(path, settings)
    template = ChatTemplate(source, texts, source=str(path)) if source is not None else None
    return TextModel(config, tokenizer, template)


def _tokenizer(path: Path, config: ModelConfig, texts: dict[str, str]) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{path} has no tokenizer.json; a Hugging Face folder needs one.")
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a tokenizer that can be loaded: {error}") from None
    return build(str(file), read_backend(str(file), text), config, texts)


def _special_texts(settings: Fields) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name in _SPECIAL:
        value: Any = settings.values.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            texts[name] = value
    return texts


def _template(path: Path, settings: Fields) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, whose value may be a list of named
    templates; "default" is the one for chat."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8 text.") from None
    value = settings.values.get("chat_template")
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[0].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise settings.refuse("chat_template", "text, or a list with one named 'default'")
    return value
