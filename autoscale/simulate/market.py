"""A recorded or made spot market: how many machines each pool had, step by step."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autoscale.catalog.offer import Offer
from autoscale.spot.levels import Ints


@dataclass(frozen=True)
class Market:
    """capacity (steps x pools): machines to be had in each step of period_s. offers: one spot offer
    for each pool, in the order of the columns, and at least one on demand, which is always to be
    had."""

    capacity: Ints
    period_s: float
    offers: tuple[Offer, ...]

    @property
    def spot(self) -> tuple[Offer, ...]:
        return tuple(offer for offer in self.offers if offer.market == "spot")

    @property
    def steps(self) -> int:
        return len(self.capacity)

    def part(self, start: int, stop: int) -> "Market":
        """The steps from start to stop."""
        return replace(self, capacity=self.capacity[start:stop])


def read_market(
    folder: Path, *, spot_usd_per_h: float, on_demand_usd_per_h: float, startup_s: float, depth: int
) -> Market:
    """Series in the format of skypilot-org/spot-traces, one file for each zone, cut to the
    shortest.

    depth: machines to be had where a series of 0 and 1 says 1 (it was recorded with one machine).
    ValueError for a folder without series, or series of unlike steps.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: no *.json in it; a trace has one file for each zone")
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    gaps = {series["metadata"]["gap_seconds"] for series in read}
    if len(gaps) > 1:
        raise ValueError(f"{folder}: steps of {sorted(gaps)} seconds; all zones need the same")
    length = min(len(series["data"]) for series in read)
    capacity = np.array([series["data"][:length] for series in read], dtype=np.int64).T
    if capacity.max() <= 1:
        capacity = capacity * depth
    zones = [file.name.split("_")[0] for file in files]
    kind = files[0].stem.split("_")[1]
    return Market(
        capacity,
        float(gaps.pop()),
        (
            *(_offer(zone, kind, spot_usd_per_h, startup_s) for zone in zones),
            _fallback(kind, on_demand_usd_per_h, startup_s),
        ),
    )


def _offer(zone: str, kind: str, usd_per_h: float, startup_s: float) -> Offer:
    return Offer(zone, kind, 1, zone.rstrip("abcdefghij"), zone, "spot", usd_per_h, None, startup_s)


@dataclass(frozen=True)
class Spells:
    """How long a zone stays full or empty, in steps: short or long ones, each geometric."""

    full_short: float = 6.0
    full_long: float = 250.0
    empty_short: float = 4.0
    empty_long: float = 40.0
    short_share: float = 0.5


def made_market(
    steps: int,
    zones: Sequence[str],
    *,
    depth: int,
    seed: int,
    period_s: float = 300.0,
    spot_usd_per_h: float = 0.918,
    on_demand_usd_per_h: float = 3.06,
    startup_s: float = 180.0,
    spells: Spells | None = None,
) -> Market:
    """A market of our own: each zone full (depth machines) or empty, for spells of unlike length,
    so that, as in recorded ones, what has lasted goes on lasting."""
    spells = spells or Spells()
    draws = np.random.default_rng(seed)
    full = np.zeros((steps, len(zones)), dtype=np.int64)
    for zone in range(len(zones)):
        step, up = 0, True
        while step < steps:
            short = draws.random() < spells.short_share
            mean = (
                (spells.full_short if short else spells.full_long)
                if up
                else (spells.empty_short if short else spells.empty_long)
            )
            length = int(draws.geometric(1 / mean))
            full[step : step + length, zone] = up
            step, up = step + length, not up
    offers = [_offer(zone, "made", spot_usd_per_h, startup_s) for zone in zones]
    return Market(
        full * depth, period_s, (*offers, _fallback("made", on_demand_usd_per_h, startup_s))
    )


def _fallback(kind: str, usd_per_h: float, startup_s: float) -> Offer:
    return Offer("on-demand", kind, 1, "any", "any", "on_demand", usd_per_h, None, startup_s)
