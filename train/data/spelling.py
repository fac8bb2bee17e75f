"""The tokenizer of a fresh model: one token per byte, and three that end and frame texts.

Written as tokenizer.json, which `models/load/folder.py` and others read.
"""

import json
from typing import Any

END_ID = 256
"""<|endoftext|>: after every document, and before the first."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 272
"""Rows of the embedding: 256 bytes and three special tokens, filled up to a multiple of 16."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""A model of plain text has no turns: a chat is the text of its messages, one after the other."""


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, by which byte-level tokenizers write bytes."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


def byte_tokenizer() -> dict[str, Any]:
    """The content of tokenizer.json; the id of a byte is the byte."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [
        {
            "id": END_ID + number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, text in enumerate(SPECIAL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": False},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {character: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }


def byte_tokenizer_text() -> str:
    """The same as text."""
    return json.dumps(byte_tokenizer(), ensure_ascii=False)
