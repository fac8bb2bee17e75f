"""Proof rows of the peers: the same load against llama.cpp's server, vLLM and transformers with
the same weights, in turns within one run. Whatever comes out is the result; a row is missed only
when a server did not get through it.

"0.40x" says how fast Sanderling is against that peer: above 1 it is ahead.
"""

from collections.abc import Iterator

from tests.peers.engines import ENGINES, THREADS
from tests.peers.measures import COMPARED, Result, Running, compare, measures, running
from tests.prove.row import Row


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured: the programs first, then each measure."""
    with running(COMPARED) as peers:
        yield started(peers)
        for measure in measures():
            yield row(compare(peers, measure))


def started(peers: Running) -> Row:
    """Which versions and formats of the weights are compared."""
    used = (ENGINES[name] for name in peers.endpoints)
    of = [f"{engine.name} ({engine.version}, {engine.weights})" for engine in used]
    measured = ", ".join([*of, *_failures(peers.failed)])
    return Row("peers", f"all start, {THREADS} threads each", measured, not peers.failed)


def row(result: Result) -> Row:
    """Medians of the rounds, and how fast the first server is against each other one."""
    first, *others = result.values or ("none",)
    parts = [f"{first} {result.median(first):.3g}"] if result.values else []
    for peer in others:
        times = result.speed(first, peer)
        parts.append(f"{peer} {result.median(peer):.3g} ({times:.2f}x)")
    measured = ", ".join([*parts, *_failures(result.failed)])
    name = f"peers: {result.measure.name}, {result.measure.unit}"
    return Row(name, "whatever it says", measured, not result.failed)


def _failures(failed: dict[str, str]) -> list[str]:
    return [f"{name} failed ({why})" for name, why in failed.items()]
