"""Offers: TOML and CSV say the same, prices replay as a walk over the history says, and what is
wrong is refused by name."""

import random
from pathlib import Path

import pytest

from autoscale.catalog.catalog import PricedCatalog, read_catalog
from autoscale.catalog.kinds import read_kinds
from autoscale.catalog.offer import Offer
from autoscale.catalog.offers import Price, read_offers, read_prices

TOML = """
[[offer]]
name = "spot-l4"
kind = "l4"
region = "r"
zone = "a"
market = "spot"
usd_per_h = 0.3
quota = 8

[[offer]]
name = "big"
kind = "h100"
count = 8
region = "r"
zone = "b"
usd_per_h = 55.0
"""
CSV = """name,kind,count,region,zone,market,usd_per_h,quota
spot-l4,l4,1,r,a,spot,0.3,8
big,h100,8,r,b,on_demand,55.0,
"""
PRICES = """
[[price]]
offer = "spot-l4"
at_s = 100
usd_per_h = 0.5
machines = 3

[[price]]
offer = "spot-l4"
at_s = 200
usd_per_h = 0.2
machines = 0
"""


def test_toml_and_csv_say_the_same(tmp_path: Path):
    (tmp_path / "o.toml").write_text(TOML)
    (tmp_path / "o.csv").write_text(CSV)
    offers = read_offers(tmp_path / "o.toml").offers
    fields = [(o.name, o.kind, o.count, o.zone, o.market, o.usd_per_h, o.quota) for o in offers]
    assert fields == [
        ("spot-l4", "l4", 1, "a", "spot", 0.3, 8),
        ("big", "h100", 8, "b", "on_demand", 55.0, None),
    ]
    from_csv = read_offers(tmp_path / "o.csv").offers
    assert [o.source for o in from_csv] == ["o.csv"] * 2
    assert [(o.name, o.count, o.usd_per_h, o.quota) for o in from_csv] == [
        (o.name, o.count, o.usd_per_h, o.quota) for o in offers
    ]


def test_prices_and_machines_are_those_of_the_time(tmp_path: Path):
    (tmp_path / "o.toml").write_text(TOML + PRICES)
    catalog = read_catalog(tmp_path / "o.toml")
    at = {t: {o.name: o for o in catalog.offers(at_s=t)} for t in (0, 100, 150, 200)}
    assert (at[0]["spot-l4"].usd_per_h, at[0]["spot-l4"].quota) == (0.3, 8)
    assert (at[100]["spot-l4"].usd_per_h, at[100]["spot-l4"].quota) == (0.5, 3)
    assert "price of 100 s" in at[150]["spot-l4"].source
    assert set(at[200]) == {"big"}
    assert [o.usd_per_h for o in catalog.offers()] == [0.3, 55.0]


def test_a_replay_is_a_walk_over_the_history():
    """Against a loop over all entries, at random times, entries of one time among them."""
    chance = random.Random(3)
    offer = Offer("o", "l4", 1, "r", "z", "spot", 1.0, quota=9)
    times = sorted(chance.choices(range(50), k=30))
    history = [
        Price(
            offer="o", at_s=t, usd_per_h=chance.random(), machines=chance.choice((0, 5, 12, None))
        )
        for t in times
    ]
    catalog = PricedCatalog(read_kinds(), (offer,), {"o": history})
    for at_s in [t / 2 for t in range(-2, 104)]:
        price, machines = 1.0, None
        for entry in history:
            if entry.at_s <= at_s:
                price, machines = entry.usd_per_h, entry.machines
        found = catalog.offers(at_s=at_s)
        if machines == 0:
            assert found == ()
        else:
            assert found[0].usd_per_h == price
            assert found[0].quota == (9 if machines is None else min(9, machines))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("market", "markt"), "the nearest is market"),
        (('"spot"', '"spots"'), "offer 1, market = 'spots' is not accepted"),
        (("usd_per_h = 55.0", "usd_per_h = -1"), "offer 2, usd_per_h"),
        (("usd_per_h = 55.0", ""), "offer 2, usd_per_h is missing"),
        (('name = "big"', 'name = "spot-l4"'), "offer 2 is called 'spot-l4' as is offer 1"),
        (('"h100"', '"h10"'), "the nearest is h100"),
        (("count = 8", "count = 0"), "offer 2, count"),
    ],
)
def test_a_wrong_offer_is_refused(change: tuple[str, str], words: str, tmp_path: Path):
    path = tmp_path / "o.toml"
    path.write_text(TOML.replace(*change))
    with pytest.raises(ValueError) as refusal:
        read_catalog(path)
    assert words in str(refusal.value)


def test_a_price_of_no_offer_and_one_out_of_order_are_refused(tmp_path: Path):
    (tmp_path / "o.toml").write_text(TOML)
    (tmp_path / "p.csv").write_text("offer,at_s,usd_per_h,machines\nbigg,0,1,\n")
    with pytest.raises(ValueError, match="'bigg', which is not known; the nearest is big"):
        read_catalog(tmp_path / "o.toml", tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text("offer,at_s,usd_per_h,machines\nbig,5,1,\nbig,4,1,2\n")
    assert [price.machines for price in read_prices(tmp_path / "p.csv")] == [None, 2]
    with pytest.raises(ValueError, match="not in the order"):
        read_catalog(tmp_path / "o.toml", tmp_path / "p.csv")


def test_a_line_with_too_many_cells_is_refused(tmp_path: Path):
    (tmp_path / "o.csv").write_text(CSV + "x,l4,1,r,a,spot,0.3,8,9\n")
    with pytest.raises(ValueError, match="more cells"):
        read_offers(tmp_path / "o.csv")
