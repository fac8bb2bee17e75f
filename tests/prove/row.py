"""One line of the proof table, and how the table is printed."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """A check: what was asked for, what was measured, whether that is enough."""

    check: str
    target: str
    measured: str
    ok: bool


def print_rows(rows: Sequence[Row]) -> bool:
    """Prints all rows as one aligned table; True when every row is ok, and for no rows."""
    lines = [("check", "target", "measured", "verdict")]
    lines += [(row.check, row.target, row.measured, "ok" if row.ok else "MISSED") for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    lines.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    for line in lines:
        print("  ".join(_padded(line, widths)).rstrip())
    return all(row.ok for row in rows)


def _padded(line: Iterable[str], widths: Iterable[int]) -> list[str]:
    return [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
