"""Tiny checkpoints with random weights, written by the `gguf` and `transformers` libraries."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from models.detokenize import BYTE_OF_CHARACTER
from tests.kernels.blocks import K_SPREAD, random_blocks

HIDDEN, HEADS, KV_HEADS, LAYERS, FF = 64, 4, 2, 2, 96
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġ Ġ"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Enough formats to cross every branch of the loader; rows of 64 fit blocks of 32.
FORMATS = {
    "token_embd": "Q8_0",
    "attn_q": "Q4_1",
    "attn_k": "Q8_0",
    "attn_v": "Q4_0",
    "attn_output": "F16",
    "ffn_gate": "BF16",
    "ffn_up": "Q4_1",
    "ffn_down": "Q8_0",
}


def byte_level_tokens() -> list[str]:
    """Two control tokens, all bytes, then what the merges make."""
    alphabet = sorted(BYTE_OF_CHARACTER, key=lambda character: BYTE_OF_CHARACTER[character])
    return ["<|im_start|>", "<|im_end|>", *alphabet, *(m.replace(" ", "") for m in MERGES)]


def sentencepiece_tokens() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a small SentencePiece vocabulary."""
    words = ["▁t", "he", "▁the", "in", "er", "▁a", "▁the▁", "▁▁", "th", "the", "▁▁▁▁", "re"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz,.é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters))
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words) + len(letters))]
    return tokens + words + letters, scores, kinds


def write_byte_level(path: Path, *, pre: str = "smollm", architecture: str = "llama") -> Path:
    """A small Llama with a GPT-2-like tokenizer and a chat template."""
    tokens = byte_level_tokens()
    writer = _writer(path, architecture, len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    return _finish(writer, path)


def write_sentencepiece(path: Path, *, space_prefix: bool = True) -> Path:
    """A small Llama with a SentencePiece tokenizer and no chat template."""
    tokens, scores, kinds = sentencepiece_tokens()
    writer = _writer(path, "llama", len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(space_prefix)
    return _finish(writer, path)


def _writer(path: Path, architecture: str, vocab: int) -> Any:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    random = np.random.default_rng(0)
    head_dim = HIDDEN // HEADS
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (KV_HEADS * head_dim, HIDDEN),
        "attn_v": (KV_HEADS * head_dim, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (FF, HIDDEN),
        "ffn_up": (FF, HIDDEN),
        "ffn_down": (HIDDEN, FF),
    }
    embed = random.normal(size=(vocab, HIDDEN))
    _tensor(writer, "token_embd.weight", embed, FORMATS["token_embd"])
    _tensor(writer, "output_norm.weight", random.normal(1, 0.1, HIDDEN), "F32")
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            _tensor(writer, f"blk.{layer}.{name}.weight", random.normal(1, 0.1, HIDDEN), "F32")
        for name, shape in shapes.items():
            values = random.normal(0, 0.3, shape)
            _tensor(writer, f"blk.{layer}.{name}.weight", values, FORMATS[name])
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                bias = random.normal(0, 0.3, shape[0])
                _tensor(writer, f"blk.{layer}.{name}.bias", bias, "F32")
    return writer


def _tensor(writer: Any, name: str, values: np.ndarray, form: str) -> None:
    kind = gguf.GGMLQuantizationType[form]
    if form in K_SPREAD:  # drawn anew: nobody here can quantise to them
        rows, columns = values.shape
        raw = random_blocks(form, rows, columns, len(name) + rows, float(values.std()))
    else:
        raw = gguf.quants.quantize(values.astype(np.float32), kind)
    writer.add_tensor(name, raw, raw_dtype=None if form in ("F32", "F16") else kind)


def _finish(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_folder(path: Path, kind: str, *, shard: str = "1GB", **settings: Any) -> Any:
    """Saves a random transformers model of class `kind`ForCausalLM; returns that model. settings:
    of its configuration, instead of ours."""
    import transformers

    shape = {
        "vocab_size": 160,
        "hidden_size": HIDDEN,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{kind}Config")(**shape | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        # Ones and zeros would hide a norm or a bias that is never applied.
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
        assert name
    model.save_pretrained(path, max_shard_size=shard)
    return model
