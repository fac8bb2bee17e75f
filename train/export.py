"""A run's weights as a Hugging Face folder, which `sanderling up --model` and transformers read.

The files appear one after the other, each whole, the weights last.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from models.config import ModelConfig
from train.data.spelling import CHAT_TEMPLATE, SPECIAL, byte_tokenizer
from train.weights import Start

MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
"""Names of an expert's matrices."""


def export(
    folder: Path, start: Start, weights: dict[str, Tensor], experts_per_token: int = 0
) -> None:
    """Writes config.json, the tokenizer's files and model.safetensors.

    weights: by transformers' names, in the dtype they are to be kept in; a tied head is left out.
    Experts become Mixtral's (Jiang et al. 2024), whose router is ours; experts_per_token: theirs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    values = config_json(start.config, dtype)
    if experts_per_token:
        weights, experts = as_mixtral(weights)
        values |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        values |= {"num_local_experts": experts, "num_experts_per_tok": experts_per_token}
        values |= {"sliding_window": None}
    _write(folder / "config.json", json.dumps(values, indent=1))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if start.text is None:
        _write(folder / "tokenizer.json", json.dumps(byte_tokenizer(), ensure_ascii=False))
        settings |= {"eos_token": SPECIAL[0], "chat_template": CHAT_TEMPLATE}
    else:
        _write(folder / "tokenizer.json", start.text.tokenizer.to_json())
        settings |= start.text.tokenizer.special_texts
        if start.text.chat_template is not None:
            settings["chat_template"] = start.text.chat_template.text
    _write(folder / "tokenizer_config.json", json.dumps(settings, indent=1, ensure_ascii=False))
    part = folder / "model.safetensors.part"
    save_file({n: t.contiguous() for n, t in weights.items()}, part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")


def as_mixtral(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Weights by Mixtral's names, each expert's matrices apart; how many experts."""
    made: dict[str, Tensor] = {}
    experts = 0
    for name, tensor in weights.items():
        layer, found, part = name.partition(".mlp.experts.")
        if not found:
            made[name] = tensor
        elif part == "router":
            made[f"{layer}.block_sparse_moe.gate.weight"] = tensor
        else:
            experts = len(tensor)
            for index, matrix in enumerate(tensor):
                made[f"{layer}.block_sparse_moe.experts.{index}.{MIXTRAL[part]}.weight"] = matrix
    return made, experts


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json for a model of this shape."""
    qwen = config.qkv_bias and not config.out_bias
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind == "linear":
        rope["factor"] = config.rope.factor
    values: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ff,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context_tokens,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope.theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": dtype,
    }
    return values if qwen else values | {"attention_bias": config.qkv_bias, "mlp_bias": False}


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
