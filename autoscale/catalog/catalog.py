"""Kinds and offers together, the latter as they are or as they were at a time. Frozen; implements
the `Catalog` that planners are given."""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoscale.catalog.kind import GpuKind
from autoscale.catalog.kinds import read_kinds
from autoscale.catalog.offer import Offer
from autoscale.catalog.offers import Price, read_offers, read_prices
from cluster.settings.catalog import nearest


@dataclass(frozen=True)
class PricedCatalog:
    """prices: of each offer by time, ascending; what `offers` answers for a time follows from
    them. ValueError when an offer or a price names what is not there."""

    kinds: Mapping[str, GpuKind]
    base_offers: Sequence[Offer]
    prices: Mapping[str, Sequence[Price]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for offer in self.base_offers:
            if offer.kind not in self.kinds:
                raise ValueError(
                    f"offer {offer.name!r} is of the kind {offer.kind!r}, which is not known; "
                    f"the nearest is {nearest(offer.kind, self.kinds)}"
                )
        names = {offer.name: offer for offer in self.base_offers}
        for name, history in self.prices.items():
            if name not in names:
                raise ValueError(
                    f"a price is of the offer {name!r}, which is not known; the nearest is "
                    f"{nearest(name, names)}"
                )
            times = [price.at_s for price in history]
            if times != sorted(times):
                raise ValueError(f"the prices of {name!r} are not in the order of their times")

    def kind(self, name: str) -> GpuKind:
        if name not in self.kinds:
            raise ValueError(
                f"no kind is called {name!r}; the nearest is {nearest(name, self.kinds)}"
            )
        return self.kinds[name]

    def offers(self, *, at_s: float | None = None) -> Sequence[Offer]:
        """All that can be had. at_s: as it was then; None: as the offers themselves say."""
        if at_s is None:
            return tuple(self.base_offers)
        found = (self._at(offer, at_s) for offer in self.base_offers)
        return tuple(offer for offer in found if offer is not None)

    def _at(self, offer: Offer, at_s: float) -> Offer | None:
        history = self.prices.get(offer.name, ())
        place = bisect.bisect_right(history, at_s, key=lambda price: price.at_s)
        if place == 0:
            return offer
        price = history[place - 1]
        if price.machines == 0:
            return None
        limits = [limit for limit in (offer.quota, price.machines) if limit is not None]
        source = f"{offer.source}, price of {price.at_s:g} s"
        quota = min(limits) if limits else None
        return replace(offer, usd_per_h=price.usd_per_h, quota=quota, source=source)


def read_catalog(
    offers: Path, prices: Path | None = None, kind_folders: Iterable[Path] = ()
) -> PricedCatalog:
    """The product's kinds, those of `kind_folders`, the offers of a file and prices over time."""
    read = read_offers(offers)
    histories: dict[str, list[Price]] = {}
    for price in (*read.prices, *(read_prices(prices) if prices else ())):
        histories.setdefault(price.offer, []).append(price)
    return PricedCatalog(read_kinds(kind_folders), read.offers, histories)
