"""Builds a tokenizer from the text of a tokenizer.json, wherever that lies: a file of a Hugging
Face folder, or a line of a GGUF file's metadata. Imports no torch.
"""

from collections.abc import Mapping

import tokenizers

from models.config import ModelConfig
from models.tokenizer import Tokenizer


def read_backend(source: str, text: str) -> tokenizers.Tokenizer:
    """The library's tokenizer. ValueError naming `source` when the text is not one."""
    try:
        return tokenizers.Tokenizer.from_str(text)
    # The library raises bare Exception.
    except Exception as error:
        raise ValueError(f"{source} is not a tokenizer that can be loaded: {error}") from None


def build(
    source: str, backend: tokenizers.Tokenizer, config: ModelConfig, texts: Mapping[str, str]
) -> Tokenizer:
    """The tokenizer of a model of this shape. texts: what a chat template may call bos_token and so
    on. ValueError naming `source` when its ids go beyond the model's."""
    prefix = tuple(backend.encode("", add_special_tokens=True).ids)
    bos = config.bos_token_id
    if bos is None and "bos_token" in texts:
        bos = backend.token_to_id(texts["bos_token"])
    tokenizer = Tokenizer(
        backend,
        source=source,
        bos_token_id=bos,
        eos_token_ids=config.eos_token_ids,
        special_texts=texts,
        # A tokenizer that also ends texts would end the prompt.
        prompt_prefix=tuple(number for number in prefix if number not in config.eos_token_ids),
    )
    if tokenizer.vocab_size > config.vocab:
        raise ValueError(
            f"{source} has token ids up to {tokenizer.vocab_size - 1}, but the model's "
            f"vocab_size is {config.vocab}."
        )
    return tokenizer
