"""transformers on the GPU that `gpu_engine` measures: the same weights, dequantised, in its model.

Built of a configuration of ours, since such a machine may have no network.
"""

import statistics
import time
from pathlib import Path

import torch

from models.config import ModelConfig
from models.load.gguf_file import open_gguf
from models.load.gguf_weights import GGUFWeights
from models.load.weights import parts

STREAM_PROMPT, STREAM_TOKENS = 32, 96


def some_ids(count: int, vocab: int, seed: int) -> list[int]:
    return [(101 + 37 * n + 997 * seed + n * n) % vocab for n in range(count)]


class Theirs:
    """transformers' model of the same weights, dequantised to dtype, with its own KV cache."""

    def __init__(self, path: Path, config: ModelConfig, device: str, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        assert config.rope.kind == "default", "only plain rotary embeddings are built here"
        theirs = LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.hidden,
            intermediate_size=config.ff,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context_tokens,
            rms_norm_eps=config.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=config.tied_head,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # not .to(dtype), which would round rotary frequencies, too
        try:
            with torch.device(device):
                model = LlamaForCausalLM(theirs)
        finally:
            torch.set_default_dtype(before)
        state = model.state_dict()
        source = GGUFWeights(open_gguf(path), config)
        for part in parts(config):
            values = torch.empty(source.shape(part.source), dtype=torch.float32)
            source.read(part.source, values)
            state[part.source].copy_(values)
        model.tie_weights()
        self.model, self.device = model.eval(), device

    @torch.inference_mode()
    def answer(self, prompt: list[int], most: int) -> list[int]:
        ids, cache, made = torch.tensor([prompt], device=self.device), None, []
        for _ in range(most):
            out = self.model(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            made.append(int(ids))
        return made

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocab] float32 after each."""
        out = self.model(torch.tensor([tokens], device=self.device))
        made: torch.Tensor = out.logits[0].float()
        return made

    @torch.inference_mode()
    def decode_tokens_per_s(self, streams: int, vocab: int) -> dict[str, float]:
        prompts = [some_ids(STREAM_PROMPT, vocab, stream) for stream in range(streams)]
        ids, cache, taken = torch.tensor(prompts, device=self.device), None, []
        for _ in range(STREAM_TOKENS):
            begun = time.perf_counter()
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids.tolist()
            taken.append(time.perf_counter() - begun)
        step_s = statistics.median(taken[1:])
        return {"tokens_per_s": streams / step_s, "step_ms": step_s * 1e3}

    @torch.inference_mode()
    def first_token_s(self, seed: int, vocab: int, tokens: int) -> float:
        ids = torch.tensor([some_ids(tokens, vocab, seed)], device=self.device)
        begun = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - begun
