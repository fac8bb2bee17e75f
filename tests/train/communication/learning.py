"""A small Llama that learns from characters on ranks that are threads: losses and bytes."""

from pathlib import Path
from typing import Any

import torch

from tests.train import tiny
from tests.train.communication.threads import ThreadTransport, ThreadWorld, on_threads
from train.data.corpus import open_corpus
from train.data.stream import SampleStream

STEPS = 160
HELD_OUT_SAMPLES = 2048
AT_ONCE = 32


def job(steps: int = STEPS, seed: int = 0, **tables: Any):
    """Byte tokens, two layers; 8 samples of 32 tokens a step. seed: of weights and samples."""
    tables.setdefault("precision", {"compute": "float32"})
    tables["optimizer"] = {"learning_rate": 3e-3} | tables.get("optimizer", {})
    return tiny.job(
        model={"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "feed_forward": 160},
        data={"sequence_tokens": 32, "held_out_every": 4},
        run={
            "tokens": 32 * 8 * steps,
            "batch_tokens": 32 * 8,
            "micro_batch_tokens": 32 * 8,
            "seed": seed,
        },
        **tables,
    )


def learn(
    world: ThreadWorld, tokens: Any, wanted: Any, change: Any = None, held_out: Any = None
) -> dict[str, Any]:
    """Losses of each step, bytes of the last; change: done to the trainer before; held_out: tokens
    whose loss rank 0 measures at the end."""
    training = tiny.trainer(wanted, tokens)
    training.exchange.transport = ThreadTransport
    if change is not None:
        change(training)
    reports = [training.step(world) for _ in range(wanted.steps)]
    return {
        "losses": [report.loss for report in reports],
        "sent": reports[-1].sent_bytes,
        "dense": reports[-1].dense_bytes,
        "formula": training.exchange.formula_bytes(world.size),
        "weights": training.flat.masters.clone(),
        "freeze": getattr(training.optimizer, "freeze", None),
        "held_out": loss_of(training, held_out) if held_out is not None and not world.rank else 0,
    }


def loss_of(training: Any, tokens: Any) -> float:
    """Nats a token on the first of some tokens, in their shuffled order."""
    stream = SampleStream(tokens, training.job.data.sequence_tokens, 0)
    count = min(HELD_OUT_SAMPLES, stream.epoch_samples) // AT_ONCE * AT_ONCE
    with torch.no_grad():
        starts = range(0, count, AT_ONCE)
        total = sum(float(training.model.loss(stream.batch(n, AT_ONCE))) for n in starts)
    return total / (count * stream.sequence_tokens)


def losses(
    corpus: Path, wanted: Any, change: Any = None, size: int = 2, held_out: bool = False
) -> dict[str, Any]:
    """Of rank 0, after every rank was seen to have the same weights."""
    # Opened once: CPython 3.11's ast, which reads an array's header, is not safe among threads.
    texts = open_corpus(corpus)
    kept = texts.held_out if held_out else None
    found = on_threads(size, learn, texts.train, wanted, change, kept)
    first: dict[str, Any] = found[0]
    assert all((rank["weights"] == first["weights"]).all() for rank in found)
    last = first["losses"][-20:]
    return first | {"end": sum(last) / len(last)}
