"""`python -m tests.peers.export GGUF FOLDER DTYPE`: the weights of a GGUF file as a Hugging Face
folder, for programs that read no GGUF. Called by tests/prove/environments.py."""

import sys
from pathlib import Path

import torch


def export(source: Path, folder: Path, dtype: str) -> None:
    """Weights and tokenizer. No end of sequence, so that an answer is as long as was asked for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **named)
    # What was read is plain numbers, which transformers does not take in.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.generation_config.eos_token_id = None
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, **named).save_pretrained(folder)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
