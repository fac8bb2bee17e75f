"""Tile sizes, warps and stages that ship: by op, GPU target and number of rows, in configs*.json.

Nothing is tuned when it runs: launchers and `cases` read the same table, so that what is launched
is what was compiled and checked. An op's entries for a target are those under the target's name,
else those under its family ("turing" for targets without matrix units, else "cuda" or "hip").
`tune.py` measures candidates on a GPU; whoever runs it commits what won.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from kernels.triton.targets import Target

TABLES = tuple(sorted(Path(__file__).parent.glob("configs*.json")))


class Config(NamedTuple):
    """rows: the largest number of rows it is for, 0 for any. constants: the kernel's tile sizes,
    and what else of its constants depends on the GPU. programs: how many the GPU should be given,
    by parts of K where tiles are fewer; 0 for no parts."""

    rows: int
    constants: Mapping[str, int]
    num_warps: int
    num_stages: int
    programs: int = 0


# What `tune.py` tries in the place of an op's entries.
_TRIED: ContextVar[Mapping[str, Config]] = ContextVar("tried", default={})  # noqa: B039


@contextmanager
def tried(op: str, config: Config) -> Iterator[None]:
    """Within it, this is the op's only entry, for any target and number of rows."""
    token = _TRIED.set({op: config})
    try:
        yield
    finally:
        _TRIED.reset(token)


def configs(op: str, target: Target) -> tuple[Config, ...]:
    """All entries of an op for a target, by rising rows, the last one for any number of rows.

    ValueError for an op or a target that has none.
    """
    if op in _TRIED.get():
        return (_TRIED.get()[op],)
    return _entries(op, target.name, target.backend if target.dot else "turing")


def known(op: str, target: Target) -> bool:
    """Whether the table has entries of its own for an op on this target, which not all need."""
    return op in _TRIED.get() or target.name in _table().get(op, {})


@functools.cache
def _entries(op: str, name: str, family: str) -> tuple[Config, ...]:
    table = _table().get(op, {})
    found = table.get(name, table.get(family))
    if not found:
        raise ValueError(
            f"configs*.json have no entry for {op} on {name}; its entries: {', '.join(table)}."
        )
    made = []
    for entry in found:
        tiles = {key: value for key, value in entry.items() if key.isupper()}
        programs = entry.get("programs", 0)
        made.append(Config(entry["rows"], tiles, entry["warps"], entry["stages"], programs))
    return tuple(made)


def choose(op: str, target: Target, rows: int) -> Config:
    """The entry for this number of rows: the first that is for as many or more."""
    entries = configs(op, target)
    return next((each for each in entries if rows <= each.rows), entries[-1])


@functools.cache
def _table() -> dict[str, dict[str, list[dict[str, int]]]]:
    every: dict[str, dict[str, list[dict[str, int]]]] = {}
    for path in TABLES:
        every |= json.loads(path.read_text("utf-8"))
    return every
