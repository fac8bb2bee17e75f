"""A job of seconds: a small model, a small text made of words that follow each other by rule."""

import random
from pathlib import Path
from typing import Any

import torch

from train.data.corpus import Corpus, encode_bytes, prepare
from train.data.spelling import END_ID
from train.data.stream import SampleStream
from train.job import Job
from train.step import Trainer
from train.weights import build_model, read_start

NOUNS = ["gull", "tern", "plover", "snipe", "curlew", "dunlin", "knot", "heron"]
VERBS = ["follows", "passes", "meets", "leaves", "calls", "answers"]


def text(sentences: int, seed: int) -> str:
    """Sentences that a small model can learn something of."""
    chance = random.Random(seed)
    words = [
        f"The {chance.choice(NOUNS)} {chance.choice(VERBS)} the {chance.choice(NOUNS)}."
        for _ in range(sentences)
    ]
    return "\n".join(words) + "\n"


def write_texts(folder: Path, documents: int = 8) -> Path:
    """A folder of text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        (folder / f"{number}.txt").write_text(text(20, number))
    return folder


def job(**tables: Any) -> Job:
    """A tiny job; tables replace its own, key by key."""
    values: dict[str, dict[str, Any]] = {
        "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "feed_forward": 48},
        "data": {"sequence_tokens": 16, "held_out_every": 4},
        "run": {"tokens": 16 * 12 * 6, "batch_tokens": 16 * 12, "micro_batch_tokens": 16 * 2},
        "optimizer": {"learning_rate": 0.01},
        "precision": {"compute": "float64"},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table} if isinstance(table, dict) else table
    return Job.model_validate(values)


def corpus(folder: Path) -> Corpus:
    """The tiny text as token ids."""
    return prepare(folder, (text(20, n) for n in range(8)), encode_bytes, END_ID, 4)


def trainer(wanted: Job, tokens: Any) -> Trainer:
    """A fresh trainer of a job over token ids."""
    torch.set_num_threads(1)
    stream = SampleStream(tokens, wanted.data.sequence_tokens, wanted.run.seed)
    return Trainer(wanted, build_model(wanted, read_start(wanted)), stream)
