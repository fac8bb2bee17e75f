"""Proof rows of the CPU kernels against every peer in process: decode at batch 1, 8 and 32 with 128
tokens of prompt, and the prefill of 512; two threads each, in turns within one run, medians.

A row is held against the peer that leaves the least of us. llama.cpp's benchmarks time a model's
step and nothing around it: they are compared with our step. vLLM, OpenVINO and transformers are
timed as whole engines: they are compared with our engine, scheduler and sampler included. See
tests/peers/inprocess.

SANDERLING_PROVE_OUT=FOLDER    also writes kernel_peers.json and kernel_peers.png there
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.peers.inprocess.compare import ENGINE, ROUNDS, STEP, Source, Table, compare
from tests.peers.inprocess.contenders import OURS, SAME_FILE, contenders, two_cores
from tests.peers.inprocess.report import draw, plain, text
from tests.prove.row import Row

BEST = {
    "accurate": {"decode 1": 1.4, "decode 8": 2.4, "decode 32": 1.6, "prefill 512": 1.0},
    "fast": {"decode 1": 1.4, "decode 8": 2.6, "decode 32": 2.0, "prefill 512": 1.2},
}
BEST |= {f"{mode} together": cells for mode, cells in BEST.items()}
OVER_SAME_FILE = {"decode 1": 2.0, "decode 8": 3.0, "decode 32": 3.0}
IDLE_SHARE = 0.05  # of one core, by all that wait together
# Of one core, by anybody, on average between measures. Engines whose threads wait for one another
# suffer unlike from company, ours least: on a busy machine the ratios flatter us.
FOREIGN_SHARE = 0.15


def rows() -> Iterator[Row]:
    """Every row of this module, once all is measured."""
    wanted = contenders()
    with two_cores():
        table = compare(wanted)
    print(text(table), flush=True)
    out = os.environ.get("SANDERLING_PROVE_OUT")
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "kernel_peers.json").write_text(json.dumps(plain(table), indent=1))
        draw(table, Path(out) / "kernel_peers.png")
    yield from verdicts(table, [contender.name for contender in wanted])


def verdicts(table: Table, wanted: list[str]) -> Iterator[Row]:
    """What the table comes to. wanted: who should be in it."""
    yield complete(table, wanted)
    idle = f"{table.idlers:.1%} of a core at most"
    yield Row("the others wait while one is measured", f"<= {IDLE_SHARE:.0%}", idle, _idle(table))
    yield quiet(table)
    for mode, cells in BEST.items():
        for cell, target in cells.items():
            yield ratio(table, cell, mode, "the best peer", target, _is_peer)
    for mode in OURS:
        for cell, target in OVER_SAME_FILE.items():
            yield ratio(table, cell, mode, SAME_FILE, target, lambda name: name == SAME_FILE)


def complete(table: Table, wanted: list[str]) -> Row:
    """Everybody was measured in every round: a peer that is missing might have been the best."""
    versions = dict.fromkeys(
        f"{name.split()[0]} {version}" for name, version in table.versions.items()
    )
    failed = [f"{name} failed ({why})" for name, why in table.failed.items()]
    silent = set(wanted) - set(table.versions) - set(table.failed)
    failed += [f"{name} was not started" for name in sorted(silent)]
    measured = ", ".join([f"{table.rounds} rounds", *versions, *failed])
    ok = not failed and table.rounds >= ROUNDS
    return Row("peers in process", f"all, {ROUNDS} rounds", measured, ok)


def quiet(table: Table) -> Row:
    """Nobody else was at work on this machine."""
    share = statistics.fmean(table.foreign or [math.inf])
    measured = f"{share:.1%} of a core between measures"
    ok = share <= FOREIGN_SHARE
    return Row("the machine is otherwise idle", f"<= {FOREIGN_SHARE:.0%}", measured, ok)


def ratio(
    table: Table, cell: str, mode: str, name: str, target: float, peers: Callable[[str], bool]
) -> Row:
    """How many times as fast one of our modes is. Without a figure of ours or a peer's: missed."""
    check = f"in process: {cell}, {mode}, over {name}"
    wanted = f">= {target:g}x"
    try:
        best = table.best(cell, OURS[mode], peers)
    except ValueError as error:
        return Row(check, wanted, str(error), False)
    step, engine = (table.median(cell, Source(OURS[mode], way)) for way in (STEP, ENGINE))
    ours = f"step {step:.4g}, engine {engine:.4g} tokens/s"
    theirs = f"{best.peer.engine} {best.peers:.4g} ({best.peer.way})"
    return Row(check, wanted, f"{best.ratio:.2f}x: {ours}; {theirs}", best.ratio >= target)


def _is_peer(name: str) -> bool:
    return name not in OURS.values()


def _idle(table: Table) -> bool:
    return table.rounds > 0 and table.idlers <= IDLE_SHARE
