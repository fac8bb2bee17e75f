"""Tables of the highest request rate by prompt and answer length, one a kind, as Melange and AIBrix
write them (JSON: `gpu`, `cost`, `tputs` by output x input, `indexes`).

A request counts as the next longer cell: no rate is made up between cells, and none beyond them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from autoscale.catalog.memory import MemoryRoom
from autoscale.catalog.profile import NOISE, TableError
from autoscale.placement.demand import Bucket, Slo
from autoscale.placement.plan import ReplicaShape


class RateTable(NamedTuple):
    """Requests per second at `rates[output][input]`, both axes ascending, in tokens."""

    output_tokens: tuple[int, ...]
    input_tokens: tuple[int, ...]
    rates: tuple[tuple[float, ...], ...]

    def rate(self, bucket: Bucket) -> float:
        """Of the smallest cell that holds the bucket; 0 beyond the table."""
        row = _first_at_least(self.output_tokens, bucket.output_tokens)
        column = _first_at_least(self.input_tokens, bucket.input_tokens)
        return 0.0 if row is None or column is None else self.rates[row][column]

    def served(self) -> Iterator[int]:
        """The tokens in and out of each cell that has a rate."""
        for output, row in zip(self.output_tokens, self.rates, strict=True):
            for tokens, rate in zip(self.input_tokens, row, strict=True):
                if rate > 0:
                    yield output + tokens


@dataclass(frozen=True)
class RateGrid:
    """A profile from such tables, for replicas of `shapes`' kinds on one accelerator each. The SLO
    is that of the measurement, which the table does not say: slo is not looked at. room: what fits,
    None where the model's size is not known and the tables are the only word."""

    tables: Mapping[str, RateTable]
    source: str
    room: MemoryRoom | None = None

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        if shape.accelerators != 1 or shape.role != "mixed":
            return 0.0
        if shape.kind not in self.tables:
            raise ValueError(f"{self.source}: there is no table of the kind {shape.kind!r}")
        return self.tables[shape.kind].rate(bucket)

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """From the model's size; without it, the longest request that the table serves at all."""
        if self.room is not None:
            return self.room.kv_tokens(shape)
        table = self.tables.get(shape.kind)
        if table is None or shape.accelerators != 1:
            return 0
        return max(table.served(), default=0)


def read_rate_table(path: Path, noise: float = NOISE) -> RateTable:
    """One kind's file. TableError names the row that is negative, of another length, or higher than
    that of a shorter request by more than `noise`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        outputs, inputs = content["indexes"]
        rates = content["tputs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {path} as a table of rates: {error}") from None
    table = RateTable(tuple(outputs), tuple(inputs), tuple(tuple(row) for row in rates))
    _refuse_bad(table, path, noise)
    return table


def _refuse_bad(table: RateTable, path: Path, noise: float) -> None:
    for name, axis in (("outputs", table.output_tokens), ("inputs", table.input_tokens)):
        if not axis or any(b <= a for a, b in pairwise(axis)):
            raise TableError(f"{path}: the {name} {list(axis)} do not ascend")
    if len(table.rates) != len(table.output_tokens):
        raise TableError(f"{path}: {len(table.rates)} rows for {len(table.output_tokens)} outputs")
    above: Sequence[float] = [float("inf")] * len(table.input_tokens)
    for output, row in zip(table.output_tokens, table.rates, strict=True):
        where = f"{path}: row of {output} output tokens"
        if len(row) != len(table.input_tokens):
            raise TableError(f"{where}: {len(row)} figures for {len(table.input_tokens)} inputs")
        above = _checked_row(row, above, table.input_tokens, where, noise)


def _checked_row(
    row: Sequence[float], above: Sequence[float], inputs: Sequence[int], where: str, noise: float
) -> list[float]:
    """The lowest rate of a request that is no longer, for each column of the next row."""
    lowest, lows = float("inf"), []
    for given, limit, tokens in zip(row, above, inputs, strict=True):
        if not _is_rate(given):
            raise TableError(
                f"{where}: {given!r} at {tokens} input tokens is negative or no number"
            )
        lowest = min(lowest, limit)
        if given > (1 + noise) * lowest:
            raise TableError(
                f"{where}: {given:g} requests/s at {tokens} input tokens, but {lowest:g} for a "
                f"shorter request; more than the noise of {noise:.0%}"
            )
        lowest = min(lowest, given)
        lows.append(lowest)
    return lows


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < float("inf")


def _first_at_least(axis: Sequence[int], tokens: int) -> int | None:
    return next((place for place, limit in enumerate(axis) if limit >= tokens), None)
