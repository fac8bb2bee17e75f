"""One thing that can be bought, at a price, in a place, on a market."""

from dataclasses import dataclass
from typing import Literal

Market = Literal["on_demand", "spot", "reserved"]


@dataclass(frozen=True)
class Offer:
    """A machine of `count` accelerators of `kind`. usd_per_h: for the whole machine. quota: most
    machines of this offer that may be held at once, None for no limit. startup_s: from the asking
    until a replica answers. source: where the price is from."""

    name: str
    kind: str
    count: int
    region: str
    zone: str
    market: Market
    usd_per_h: float
    quota: int | None = None
    startup_s: float = 180.0
    network_gb_per_s: float = 1.25
    source: str = ""
