"""A check of the proof table that fails by raising is a missed row, not the end of the table."""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

from tests.prove.row import Row


def attempt(name: str, check: Callable[[], Row | Iterable[Row]]) -> Iterator[Row]:
    """The rows of `check()` as they come; what it raises ends them with a missed row `name`."""
    try:
        rows = check()
        yield from [rows] if isinstance(rows, Row) else rows
    except Exception as error:  # any failure of what is being proved
        traceback.print_exc(file=sys.stderr)
        first = str(error).strip().partition("\n")[0]
        yield Row(name, "no exception", f"{type(error).__name__}: {first}", False)
