"""All contenders on all cells, in turns within one run: a cell goes round every engine before the
next, a round goes through every cell. All stay loaded; the one that is asked has the machine alone.

Figures are tokens per second by way of measuring: `step` is a model's step without an engine
around it, anything else a whole engine. Like is compared with like. Called by
tests/prove/kernel_peers.py.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil

from tests.peers.inprocess.children import Asked, ChildError
from tests.peers.inprocess.contenders import Contender
from tests.peers.inprocess.protocol import Cell

CELLS = {
    "decode 1": Cell(1, 128, 64),
    "decode 8": Cell(8, 128, 64),
    "decode 32": Cell(32, 128, 64),
    "prefill 512": Cell(1, 512, 0),
}
ROUNDS = 3
# A round that would end later than this is not begun, and the table says that it is missing.
WHOLE_S = 1500.0
LOOK_S = 0.5
STEP = "step"
ENGINE = "engine"


class Source(NamedTuple):
    """Whose figures, measured which way."""

    engine: str
    way: str


class Best(NamedTuple):
    """The peer against which an engine does worst, that peer's figure, the engine's own that is
    like it, and how many times as fast the engine is."""

    peer: Source
    peers: float
    own: float
    ratio: float


@dataclass
class Table:
    """The figures of each cell and source, one a round; what went wrong, by engine; how much
    processor time the waiting ones took at most, of that which passed; and how many cores were
    busy each time that nobody was measured."""

    values: dict[str, dict[Source, list[float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    idlers: float = 0.0
    foreign: list[float] = field(default_factory=list)

    def add(self, cell: str, source: Source, figure: float) -> None:
        self.values.setdefault(cell, {}).setdefault(source, []).append(figure)

    def fail(self, engine: str, reason: str) -> None:
        """Why an engine is out, and none of its figures."""
        self.failed[engine] = reason
        for sources in self.values.values():
            for source in [source for source in sources if source.engine == engine]:
                del sources[source]

    def median(self, cell: str, source: Source) -> float:
        """KeyError when the cell has no figures of this source."""
        return statistics.median(self.values[cell][source])

    def best(self, cell: str, engine: str, peers: Callable[[str], bool]) -> Best:
        """Against the engines of whose names `peers` says yes. ValueError without any figures."""
        found = []
        for source in self.values.get(cell, {}):
            if peers(source.engine):
                figure = self.median(cell, source)
                way = STEP if source.way == STEP else ENGINE
                own = self._own(cell, Source(engine, way))
                found.append(Best(source, figure, own, own / figure))
        if not found:
            raise ValueError(f"{cell}: no peer has a figure")
        return min(found, key=lambda one: one.ratio)

    def _own(self, cell: str, source: Source) -> float:
        if source not in self.values[cell]:
            why = self.failed.get(source.engine, "it was not measured")
            raise ValueError(f"{cell}: no figure of {source.engine} ({why})")
        return self.median(cell, source)


def compare(
    contenders: Sequence[Contender], cells: dict[str, Cell] = CELLS, rounds: int = ROUNDS
) -> Table:
    """Start all, warm all up, then `rounds` rounds or as many as there is time for."""
    table = Table()
    begun_s = time.monotonic()
    with _started(contenders, cells.values(), table) as asked:
        for turn in range(rounds):
            round_s = time.monotonic()
            for name, cell in cells.items():
                table.foreign.append(busy_cores())
                for contender in contenders:
                    if contender.name in asked and contender.name not in table.failed:
                        tokens = min(cell.new_tokens, contender.new_tokens)
                        given = cell._replace(turn=turn + 1, new_tokens=tokens)
                        _take(table, name, contender.name, given, asked)
            table.rounds += 1
            now_s = time.monotonic()
            _tell(f"round {turn + 1} of {rounds}: {now_s - round_s:.0f} s")
            if now_s - begun_s + (now_s - round_s) > WHOLE_S:
                break
    return table


def busy_cores(during_s: float = LOOK_S) -> float:
    """How many of this machine's cores were busy for a moment, with whatever it was."""
    share: float = psutil.cpu_percent(during_s)
    return share / 100 * (psutil.cpu_count() or 1)


def _take(table: Table, name: str, engine: str, cell: Cell, asked: dict[str, Asked]) -> None:
    """One engine's figures of one cell, and what the others did meanwhile."""
    waiting = [one for other, one in asked.items() if other != engine]
    spent_s, begun_s = sum(one.cpu_s() for one in waiting), time.monotonic()
    try:
        figures = asked[engine].figures(cell)
    except ChildError as error:
        table.fail(engine, f"{name}: {error}")
        return
    passed_s = time.monotonic() - begun_s
    table.idlers = max(table.idlers, (sum(one.cpu_s() for one in waiting) - spent_s) / passed_s)
    for way, figure in figures.items():
        table.add(name, Source(engine, way), figure)
    said = ", ".join(f"{way} {figure:.4g}" for way, figure in figures.items())
    _tell(f"{name} turn {cell.turn}, {engine}: {said} tokens/s")


@contextlib.contextmanager
def _started(
    contenders: Sequence[Contender], cells: Iterable[Cell], table: Table
) -> Iterator[dict[str, Asked]]:
    """Those that are ready, by name; the table has the reasons of the others."""
    warm_up = [cell._replace(prompt_tokens=32, new_tokens=16) for cell in cells if cell.new_tokens]
    warm_up += [cell for cell in cells if not cell.new_tokens]
    asked: dict[str, Asked] = {}
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            begun_s = time.monotonic()
            try:
                one = stack.enter_context(contender.run())
                table.versions[contender.name] = one.version
                for cell in warm_up if contender.kept else []:
                    one.figures(cell)
            # Another person's program, or what installs it: the table says what went wrong.
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                table.fail(contender.name, f"{type(error).__name__}: {lines[-1][:200]}")
            else:
                asked[contender.name] = one
            _tell(f"{contender.name}: {time.monotonic() - begun_s:.0f} s to be ready")
        yield asked


def _tell(what: str) -> None:
    print(f"   {what}", file=sys.stderr, flush=True)
