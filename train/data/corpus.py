"""Documents as two arrays of token ids in the run's folder, one to train on and one held out.

Made once by whoever starts the run; workers map the files.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.stream import Tokens

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Corpus:
    """Token ids of both parts, and how many bytes of text the held-out ones stand for."""

    train: Tokens
    held_out: Tokens
    held_out_bytes: int
    fingerprint: str


def encode_bytes(text: str) -> list[int]:
    """A token per byte."""
    return list(text.encode())


def prepare(
    folder: Path, documents: Iterable[str], encode: Encode, end_id: int, held_out_every: int
) -> Corpus:
    """Writes the corpus to `folder` and opens it; every held_out_every-th document is held out.
    ValueError when either part would be empty."""
    parts: tuple[list[int], list[int]] = ([end_id], [end_id])
    held_out_bytes = 0
    for number, text in enumerate(documents):
        held = number % held_out_every == held_out_every - 1
        parts[held].extend([*encode(text), end_id])
        held_out_bytes += len(text.encode()) if held else 0
    if len(parts[0]) < 2 or not held_out_bytes:
        raise ValueError(
            "data: too little text; data.held_out_every documents are needed at least "
            f"(here {held_out_every}), and some text in them."
        )
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for name, ids in zip(("train", "held_out"), parts, strict=True):
        array = np.array(ids, np.uint16 if max(ids) < 1 << 16 else np.uint32)
        digest.update(array.tobytes())
        _write(folder / f"{name}.npy", array)
    facts = {"held_out_bytes": held_out_bytes, "fingerprint": digest.hexdigest()}
    part = folder / f"corpus.json.{os.getpid()}"
    part.write_text(json.dumps(facts))
    part.replace(folder / "corpus.json")  # last: whoever sees it finds all
    return open_corpus(folder)


def open_corpus(folder: Path) -> Corpus:
    """What `prepare` wrote, mapped."""
    facts = json.loads((folder / "corpus.json").read_text())
    train, held_out = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "held_out")
    )
    return Corpus(train, held_out, facts["held_out_bytes"], facts["fingerprint"])


def evaluation_batches(corpus: Corpus, sequence_tokens: int, tokens: int) -> Iterator[Tokens]:
    """Held-out sequences from the start, each of sequence_tokens + 1, as many as predict at most
    `tokens`, but at least one where the text is as long as one."""
    held = corpus.held_out
    there = (len(held) - 1) // sequence_tokens
    count = min(max(tokens // sequence_tokens, 1), there)
    for start in range(0, count * sequence_tokens, sequence_tokens):
        yield held[start : start + sequence_tokens + 1]


def _write(path: Path, array: NDArray[Any]) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, array)
    part.replace(path)
