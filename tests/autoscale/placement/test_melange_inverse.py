"""The inverse profile on a table that is known: it has to be found again, and what cannot be has to
be called impossible."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autoscale.placement.aggregate import AggregatePlanner
from tests.prove.melange_inverse import (
    KINDS,
    Published,
    corners,
    disagreeing,
    invert,
)
from tests.prove.placement_aggregate import arena_problem, machines

PRICES = np.array([7.5, 3.7, 1.0, 0.7])
WORSE = {(25, 100): (2.6, 1.3, 1.0, 1.1), (1000, 100): (1.4, 1.0, 1.2, 1.9)}
DOLLARS = {(25, 100): 0.83, (1000, 100): 1.07}  # asked of the best kind at 1 request/s


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    """As the figures would show that table."""
    rows = [WORSE[size] for size in sorted(WORSE)]
    percent = [np.sort(100 * (np.array(worse) - 1)).round() for worse in rows]
    a10g = [100 * (worse[1] / worse[2] - 1) for worse in rows]
    a100 = [100 * (worse[2] / worse[1] - 1) for worse in rows]
    table = {
        "inputs_tokens": [25, 1000],
        "outputs_tokens": [100],
        "llama2_7b_best_gpu": [[KINDS[int(np.argmin(worse))] for worse in rows]],
        "best_vs_second_pct": [[float(each[1]) for each in percent]],
        "best_vs_worst_pct": [[float(each[-1]) for each in percent]],
        "a10g_vs_a100_pct_positive_means_A10G": [
            [round(a) if a > 0 else -round(b) for a, b in zip(a10g, a100, strict=True)]
        ],
    }
    path = tmp_path / "grids.json"
    path.write_text(json.dumps(table))
    return path


def truth(requests_per_s: float) -> Published:
    """What the known table publishes: counts of one kind, and the cheapest mix by trying all."""
    loads = np.array([DOLLARS[s] * np.array(WORSE[s]) / PRICES for s in sorted(WORSE)])
    loads *= requests_per_s
    alone = tuple(int(n) for n in np.ceil(loads.sum(axis=0)))
    best: tuple[float, tuple[int, ...]] = (np.inf, ())
    for mix in np.ndindex(*(n + 1 for n in alone)):
        usd = float(PRICES @ np.array(mix))
        if usd < best[0] and carries(loads, np.array(mix)):
            best = usd, tuple(int(n) for n in mix)
    return Published(requests_per_s, alone, best[1])


def carries(loads: np.ndarray, mix: np.ndarray) -> bool:
    """Two buckets: machines by how well they suit the first; it takes them in that order, the
    second gets the rest."""
    left = 1.0
    other = 0.0
    for kind in np.argsort(loads[0] / loads[1]):
        taken = min(left, mix[kind] / loads[0][kind])
        left -= taken
        other += (mix[kind] - taken * loads[0][kind]) / loads[1][kind]
    return bool(left < 1e-12 and other >= 1)


def test_a_known_table_is_found_again(grids: Path):
    rows = [truth(rate) for rate in (1, 2, 4)]
    found = invert(corners(grids, 1000), PRICES, rows)
    assert found.margin > 0 and disagreeing(grids, found) == []
    for row in rows:
        plan = AggregatePlanner().plan(arena_problem(found, row.requests_per_s))
        assert plan.usd_per_h == pytest.approx(float(PRICES @ np.array(row.mix)))
        alone = tuple(
            machines(AggregatePlanner().plan(arena_problem(found, row.requests_per_s, kind)))
            for kind in KINDS
        )
        assert alone == row.alone


def test_what_cannot_be_is_called_impossible(grids: Path):
    """One A10G less than the table needs, and a mix of one L4 where nobody can do with so
    little."""
    row = truth(4)
    fewer = replace(row, mix=(0, 0, 0, 1))
    assert invert(corners(grids, 1000), PRICES, [fewer]).margin < 0
    odd = replace(row, alone=(row.alone[0], row.alone[1], 2, row.alone[3]))
    assert invert(corners(grids, 1000), PRICES, [odd]).margin < 0
