"""Reads what can be bought from TOML or CSV, and prices as they were over time.

A TOML holds `[[offer]]` tables with the fields of `Offer`, and may hold `[[price]]` tables
(`offer`, `at_s`, `usd_per_h`, `machines`); a CSV has the same names in its first line, one file for
each. Between two entries the earlier one holds; before the first, the offer's own price.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from autoscale.catalog.offer import Market, Offer
from cluster.reading import Strict, read_toml, validated

Name = Annotated[str, Field(min_length=1)]


class OfferTable(Strict):
    """An offer as it is written. source: of its price; the file's name where it says none."""

    name: Name
    kind: Name
    count: int = Field(default=1, ge=1)
    region: str = "local"
    zone: str = "local"
    market: Market = "on_demand"
    usd_per_h: float = Field(ge=0)
    quota: int | None = Field(default=None, ge=0)
    startup_s: float = Field(default=180.0, ge=0)
    network_gb_per_s: float = Field(default=1.25, gt=0)
    source: str = ""


class Price(Strict):
    """From `at_s` on an offer costs so much. machines: how many can be had, at most; 0: none;
    None: as many as the quota allows."""

    offer: Name
    at_s: float
    usd_per_h: float = Field(ge=0)
    machines: int | None = Field(default=None, ge=0)


class _OffersFile(Strict):
    offer: tuple[OfferTable, ...] = Field(min_length=1)
    price: tuple[Price, ...] = ()


class _PricesFile(Strict):
    price: tuple[Price, ...] = Field(min_length=1)


class OffersRead(NamedTuple):
    """What a file of offers holds."""

    offers: tuple[Offer, ...]
    prices: tuple[Price, ...]


def read_offers(path: Path) -> OffersRead:
    """Offers, and the prices over time that the file states. ValueError names the wrong entry."""
    if path.suffix == ".csv":
        content: dict[str, Any] = {"offer": list(_csv_rows(path))}
    else:
        content = read_toml(path)
    file = validated(_OffersFile, content, str(path))
    offers = tuple(
        Offer(**{**table.model_dump(), "source": table.source or f"{path.name}"})
        for table in file.offer
    )
    _refuse_twice([offer.name for offer in offers], path)
    return OffersRead(offers, file.price)


def read_prices(path: Path) -> tuple[Price, ...]:
    """A history of prices. ValueError names the wrong entry."""
    if path.suffix == ".csv":
        content: dict[str, Any] = {"price": list(_csv_rows(path))}
    else:
        content = read_toml(path)
    return validated(_PricesFile, content, str(path)).price


def _refuse_twice(names: Sequence[str], path: Path) -> None:
    for place, name in enumerate(names):
        first = names.index(name)
        if first != place:
            raise ValueError(
                f"{path}: offer {place + 1} is called {name!r} as is offer {first + 1}"
            )


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines as tables; an empty cell is a key that is not given."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                if None in line:
                    raise ValueError(f"{path}: a line has more cells than the first: {line[None]}")
                yield {key: value for key, value in line.items() if value}
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
