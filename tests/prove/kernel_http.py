"""Proof rows of the CPU kernels over HTTP: the same load on our service, on llama.cpp's server (the
published file, and a requantised one that it is faster on) and on vLLM's, in turns within one run.
Rows are of `sanderling`, one replica with the threads that each peer has, its bits free to depend
on company as those of peers do; the service as it comes, with prefill replicas, routing and the
same bits in any company, is told beside it.

All servers stay up while one of them has work; what the idle ones take of a core is a row.

SANDERLING_PROVE_OUT=FOLDER                           also draws and writes kernel_http.*
python -m tests.prove.kernel_http --plot FOLDER       the same, and nothing else
  ... --seconds 300       in pieces: figures are kept in FOLDER/kernel_http_cells.json, the row of
                          what is left is missed, and the same command goes on, until all is there
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.peers.inprocess.compare import busy_cores
from tests.peers.kept import Kept, load
from tests.peers.measures import ROUNDS, Running, running
from tests.peers.picture import draw, plain, text
from tests.peers.sweeps import Keeper, Taken, take_contexts, take_seen, take_streams
from tests.prove import table
from tests.prove.peers import started
from tests.prove.row import Row

OURS = "sanderling"
AS_IT_COMES = "sanderling-default"
PEERS = ("llama.cpp", "llama.cpp-Q4_0", "vLLM")
# By servers with a slot of the model's whole context: whose line they draw.
LONG = {
    **{OURS: OURS, "vLLM": "vLLM"},
    **{"llama.cpp-long": "llama.cpp", "llama.cpp-Q4_0-long": "llama.cpp-Q4_0"},
}
RATES = {1: 1.2, 8: 2.0, 32: 1.7}
MORE_STREAMS = (2, 4, 16, 64)
CONTEXTS = (128, 512, 2048, 8000)  # and an answer, in 8192
FIRST_SEEN_S = 0.035
OF_BEST = 0.5
IDLE_SHARE = 0.15  # of a core: two services of ours and four of others
IDLE_S = 5.0


def rows() -> Iterator[Row]:
    """Every row of this module, once all is measured; pictures where they are asked for."""
    out = os.environ.get("SANDERLING_PROVE_OUT")
    seconds = os.environ.get("SANDERLING_PROVE_SECONDS")
    cells = Path(out) / "kernel_http_cells.json" if out and seconds else None
    taken = load(cells)
    names = dict.fromkeys((OURS, AS_IT_COMES, *PEERS, *(LONG if out else ())))
    with running([name for name in names if name not in taken.failed]) as peers:
        yield started(peers)
        yield idle("before")
        if cells is not None:
            cells.parent.mkdir(parents=True, exist_ok=True)
        measure(peers, taken, bool(out), Kept(taken, cells, float(seconds or "inf")))
        yield idle("after")
    if seconds:
        measured = f"{taken.left} of {taken.left + len(taken.done)}; the same command goes on"
        yield Row("over HTTP: questions that are left", "0", measured, taken.left == 0)
    print(text(taken), flush=True)
    if taken.left:
        return
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "kernel_http.json").write_text(json.dumps(plain(taken), indent=1))
        draw(taken, Path(out) / "kernel_http.png")
    yield from verdicts(taken)


def measure(peers: Running, taken: Taken, drawn: bool, keeper: Keeper) -> None:
    """What the rows need; with `drawn`, what the pictures need besides, one round of it."""
    for name, why in peers.failed.items():
        taken.fail(name, why)
    short = Running({n: e for n, e in peers.endpoints.items() if "long" not in n}, peers.failed)
    take_streams(short, taken, RATES, ROUNDS, keeper)
    take_seen(short, taken, ROUNDS, keeper)
    if drawn:
        take_streams(short, taken, MORE_STREAMS, 1, keeper)
        take_contexts(peers, taken, CONTEXTS, LONG, keeper)


def verdicts(taken: Taken) -> Iterator[Row]:
    """What the figures come to. A peer without figures, or ours, is a missed row."""
    everyone = (OURS, AS_IT_COMES, *PEERS)
    gone = [f"{name} failed ({why})" for name, why in taken.failed.items()]
    measured = ", ".join(gone) or f"all {len(everyone)}"
    yield Row("over HTTP: every server got through", "all", measured, not gone)
    for streams, target in RATES.items():
        yield _row(
            f"over HTTP: {streams} streams, over the best peer",
            f">= {target:g}x",
            lambda s=streams, t=target: rate(taken, s, t),  # type: ignore[misc]
        )
    for streams in RATES:
        yield _row(
            f"over HTTP: first token p90 of {streams} streams",
            "<= the best peer's",
            lambda s=streams: first_p90(taken, s),  # type: ignore[misc]
        )
    yield _row(
        "over HTTP: first token after 512 seen before and 16 new",
        f"<= {FIRST_SEEN_S * 1e3:.0f} ms or {OF_BEST:g} of the best peer's",
        lambda: first_seen(taken),
    )


def rate(taken: Taken, streams: int, target: float) -> tuple[str, bool]:
    """Output tokens per second, the time of the prompts included."""
    figures = {name: taken.rate(streams, name) for name in (OURS, AS_IT_COMES, *PEERS)}
    best = max(PEERS, key=lambda name: figures[name])
    times = figures[OURS] / figures[best]
    ours = f"{figures[OURS]:.4g} tokens/s (as it comes {figures[AS_IT_COMES]:.4g})"
    return f"{times:.2f}x: {ours}; {best} {figures[best]:.4g}", times >= target


def first_p90(taken: Taken, streams: int) -> tuple[str, bool]:
    """Over the answers of all rounds."""
    return _least(lambda name: taken.first_p90_s(streams, name), lambda best: best)


def first_seen(taken: Taken) -> tuple[str, bool]:
    """The median of the rounds."""
    return _least(taken.first_seen_s, lambda best: max(FIRST_SEEN_S, OF_BEST * best))


def _least(seconds: Callable[[str], float], allowed: Callable[[float], float]) -> tuple[str, bool]:
    figures = {name: seconds(name) * 1e3 for name in (OURS, AS_IT_COMES, *PEERS)}
    best = min(PEERS, key=lambda name: figures[name])
    ours = f"{figures[OURS]:.4g} ms (as it comes {figures[AS_IT_COMES]:.4g})"
    ok = figures[OURS] <= allowed(figures[best] / 1e3) * 1e3
    return f"{ours}; {best} {figures[best]:.4g}", ok


def _row(check: str, target: str, judge: Callable[[], tuple[str, bool]]) -> Row:
    try:
        measured, ok = judge()
    except KeyError as error:
        return Row(check, target, f"no figures of {error.args[0]}", False)
    return Row(check, target, measured, ok)


def idle(when: str) -> Row:
    """What the servers, and whoever else is at work, take of a core while nobody asks anything."""
    time.sleep(1.0)
    share = busy_cores(IDLE_S)
    measured = f"{share:.1%} of a core"
    return Row(
        f"all servers idle, machine too, {when}",
        f"<= {IDLE_SHARE:.0%}",
        measured,
        share <= IDLE_SHARE,
    )


def main(arguments: list[str] | None = None) -> int:
    """This module alone, with its pictures; 1 when a row is missed."""
    parser = argparse.ArgumentParser(prog="kernel_http", description="Peers over HTTP, drawn.")
    parser.add_argument("--plot", type=Path, required=True, help="a folder for JSON and PNG")
    parser.add_argument("--seconds", type=float, help="of questions in this piece; default: all")
    options = parser.parse_args(arguments)
    os.environ["SANDERLING_PROVE_OUT"] = str(options.plot)
    if options.seconds is not None:
        os.environ["SANDERLING_PROVE_SECONDS"] = str(options.seconds)
    return table.main("kernel_http", ("kernel_http",), [])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with us
    sys.exit(main())
