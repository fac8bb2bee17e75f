"""A small Llama that learns from characters on ranks that are threads: losses and bytes."""

from pathlib import Path
from typing import Any

from tests.train import tiny
from tests.train.communication.threads import ThreadTransport, ThreadWorld, on_threads
from train.data.corpus import open_corpus

STEPS = 160


def job(steps: int = STEPS, **tables: Any):
    """Byte tokens, two layers; 8 samples of 32 tokens a step."""
    tables.setdefault("precision", {"compute": "float32"})
    tables["optimizer"] = {"learning_rate": 3e-3} | tables.get("optimizer", {})
    return tiny.job(
        model={"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "feed_forward": 160},
        data={"sequence_tokens": 32, "held_out_every": 4},
        run={
            "tokens": 32 * 8 * steps,
            "batch_tokens": 32 * 8,
            "micro_batch_tokens": 32 * 8,
        },
        **tables,
    )


def learn(world: ThreadWorld, tokens: Any, wanted: Any, change: Any = None) -> dict[str, Any]:
    """Losses of each step, bytes of the last; change: done to the trainer before."""
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
    }


def losses(corpus: Path, wanted: Any, change: Any = None, size: int = 2) -> dict[str, Any]:
    """Of rank 0, after every rank was seen to have the same weights."""
    # Opened once: CPython 3.11's ast, which reads an array's header, is not safe among threads.
    found = on_threads(size, learn, open_corpus(corpus).train, wanted, change)
    first: dict[str, Any] = found[0]
    assert all((rank["weights"] == first["weights"]).all() for rank in found)
    last = first["losses"][-20:]
    return first | {"end": sum(last) / len(last)}
