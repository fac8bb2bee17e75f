"""Signals and decisions as lines of JSON, and a log of them that decides itself again.

The first line says what the loop was made of, every further one holds a step: what was seen, then
what was decided. Equal values give equal bytes, so that a log either repeats byte for byte or shows
where it does not.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from autoscale.loop.actions import Decision
from autoscale.loop.signals import Signals
from autoscale.loop.step import Loop
from autoscale.spot.basic import OnDemandPolicy, Refusals
from autoscale.spot.belief import SpotRisk
from autoscale.spot.hedge import HedgePolicy, Placer
from autoscale.spot.levels import Chain
from autoscale.spot.mixed import MixedPolicy
from cluster.settings.autoscale import AutoscaleSettings


@dataclass(frozen=True)
class Head:
    """Everything that a loop is made of. pools: of the spot market, for spothedge. chain: what
    mixed has learnt, as plain lists. start_s: of the clock, when the loop began."""

    name: str
    settings: AutoscaleSettings
    start_s: float
    pools: tuple[str, ...] = ()
    chain: dict[str, Any] | None = None


@dataclass(frozen=True)
class Step:
    """One line of a log."""

    signals: Signals
    decision: Decision


HEAD: TypeAdapter[Head] = TypeAdapter(Head)
STEP: TypeAdapter[Step] = TypeAdapter(Step)


def head_of(
    settings: AutoscaleSettings,
    name: str,
    *,
    start_s: float = 0.0,
    pools: Sequence[str] = (),
    chain: Chain | None = None,
) -> Head:
    """name: of this loop, never used before over the same provider."""
    plain = None
    if chain is not None:
        plain = {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in asdict(chain).items()
        }
    return Head(name, settings, start_s, tuple(pools), plain)


def make_loop(head: Head) -> Loop:
    """ValueError when the policy lacks what it needs: mixed a chain, spothedge two pools."""
    settings = head.settings
    if settings.policy == "mixed":
        if head.chain is None:
            raise ValueError(
                "autoscale.policy = 'mixed' needs what a recorded market has taught; a folder in "
                "autoscale.history is accepted, or policy = 'spothedge' or 'on_demand'"
            )
        risk = SpotRisk(_chain(head.chain), head.start_s)
        return Loop(settings, MixedPolicy(settings.short_price), risk, head.name)
    if settings.policy == "spothedge":
        return Loop(settings, HedgePolicy(settings.over), Placer(head.pools), head.name)
    return Loop(settings, OnDemandPolicy(), Refusals(), head.name)


def _chain(plain: dict[str, Any]) -> Chain:
    arrays = ("drop", "rise", "drop_to", "rise_to", "scarce", "drops", "expected")
    names = ("pools", "regions", "levels")
    fields: dict[str, Any] = {
        key: np.array(value) if key in arrays else tuple(value) if key in names else value
        for key, value in plain.items()
    }
    return Chain(**fields)


class FileLog:
    """Writes a log. A step is on its way to the disk before it is carried out."""

    def __init__(self, file: IO[bytes], head: Head) -> None:
        self._file = file
        self._write(HEAD.dump_json(head))

    def note(self, signals: Signals, decision: Decision) -> None:
        self._write(STEP.dump_json(Step(signals, decision)))

    def _write(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._file.flush()


class Repeated(NamedTuple):
    """A step of a log, decided again. same: byte for byte."""

    line: int
    step: Step
    again: Decision
    same: bool


def repeat(lines: Iterable[bytes]) -> Iterator[Repeated]:
    """Decide a log again. ValueError names a line that cannot be read."""
    numbered = enumerate(lines, 1)
    loop = make_loop(_read(HEAD, next(numbered, (1, b""))))
    state = loop.start()
    for number, line in numbered:
        step = _read(STEP, (number, line))
        state, again = loop.step(state, step.signals)
        same = STEP.dump_json(Step(step.signals, again)) == line.rstrip(b"\n")
        yield Repeated(number, step, again, same)


def _read(kind: TypeAdapter[Any], line: tuple[int, bytes]) -> Any:
    try:
        return kind.validate_json(line[1])
    except ValueError as error:
        first = str(error).partition("\n")
        detail = " ".join(first[2].split("\n")[:2]).strip()
        raise ValueError(f"line {line[0]} of the log is no line of a loop: {detail}") from None


def repeat_file(path: Path) -> Iterator[Repeated]:
    """As `repeat`, of a file."""
    with path.open("rb") as file:
        yield from repeat(file)
