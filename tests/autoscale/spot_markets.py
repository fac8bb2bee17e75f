"""What the spot tests share: small markets, where recorded ones lie, and SpotHedge written a second
time, plainly, as an oracle."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from autoscale.catalog.offer import Offer
from autoscale.simulate.market import Market, read_market

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
TRACES = {
    "aws1": DATA / "spot-traces" / "preemption" / "4-node" / "aws-08-03-2023",
    "aws3": DATA / "spot-traces" / "availability" / "1-node" / "aws-02-15-2023",
}


def recorded(name: str) -> Market:
    """A recorded market at the prices of p3.2xlarge; skips where it is absent."""
    if not TRACES[name].is_dir():
        pytest.skip(f"{TRACES[name]} is not here")
    return read_market(
        TRACES[name], spot_usd_per_h=0.918, on_demand_usd_per_h=3.06, startup_s=180.0, depth=64
    )


def market(
    capacity: list[list[int]], *, spot: float = 0.3, on_demand: float = 1.0, regions: str = ""
) -> Market:
    """A market of the given capacity; pools are called a, b, ... regions: a letter for each."""
    pools = len(capacity[0])
    offers = [
        Offer(name, "g", 1, (regions or "xyzuvw")[place], name, "spot", spot, None, 180.0)
        for place, name in enumerate("abcdef"[:pools])
    ]
    offers.append(Offer("od", "g", 1, "any", "any", "on_demand", on_demand, None, 180.0))
    return Market(np.array(capacity, dtype=np.int64), 300.0, tuple(offers))


class Came(NamedTuple):
    """What the oracle came to."""

    served: int
    cost: float
    refused: int


def plain_hedge(made: Market, need: int, over: int, ratio: float) -> Came:
    """SpotHedge at one spot price, step by step, with 2 x pools attempts in each."""
    pools = len(made.spot)
    active = set(range(pools))
    spot: list[tuple[int, int]] = []
    on_demand: list[int] = []
    served = refused = paid = bought = 0

    def set_aside(pool: int) -> None:
        nonlocal active
        active.discard(pool)
        if len(active) < 2:
            active = set(range(pools))

    for step, there in enumerate(made.capacity.tolist()):
        for pool in range(pools):
            mine = sorted(node for node in spot if node[0] == pool)
            if len(mine) > there[pool]:
                spot = [node for node in spot if node[0] != pool] + mine[: there[pool]]
                spot.sort(key=lambda node: node[1])
                set_aside(pool)
        ready = sum(since < step for _, since in spot)
        served += ready + sum(since < step for since in on_demand) >= need
        for _ in range(2 * pools):
            if len(spot) >= need + over:
                break
            used = {pool for pool, _ in spot}
            pool = min([p for p in active if p not in used] or active)
            if sum(node[0] == pool for node in spot) < there[pool]:
                spot.append((pool, step))
                active.add(pool)
            else:
                refused += 1
                set_aside(pool)
        wanted = max(0, min(need, need + over - ready))
        on_demand = on_demand[:wanted] + [step] * (wanted - len(on_demand))
        paid, bought = paid + len(spot), bought + len(on_demand)
    return Came(served, (ratio * paid + bought) / (need * made.steps), refused)
