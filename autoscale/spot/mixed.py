"""Our policy: least expected cost while enough replicas answer, with how much to hold beyond the
need, where, and how much of it on demand as outputs.

Each decision weighs dollars against the chance of being short before a replacement could answer.
The price of being short is the multiplier of the constraint P(ready >= need) >= target; `calibrate`
finds it by replaying the history that the risk model was learnt from, and no later one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoscale.catalog.offer import Offer
from autoscale.spot.allocation import Choice, Question, Table, choose
from autoscale.spot.belief import SpotRisk
from autoscale.spot.fleet import (
    Action,
    Fleet,
    Launch,
    Terminate,
    cheapest_on_demand,
    spot_offers,
)
from autoscale.spot.levels import Floats


@dataclass(frozen=True)
class MixedPolicy:
    """short_price: what a moment short of replicas is worth, in moments of the whole need bought on
    demand. refusal_price: what a refused launch costs, in hours of the machine (it backs off from
    pools that are unlikely to give one). pools_weighed: how many pools one decision combines."""

    short_price: float
    refusal_price: float = 0.25
    pools_weighed: int = 4
    scout_chance: float = 0.5
    name: str = "mixed"

    def decide(
        self, now_s: float, need: int, fleet: Fleet, offers: Sequence[Offer], risk: SpotRisk
    ) -> list[Action]:
        spot = [offer for offer in spot_offers(offers) if offer.name in risk.chain.pools]
        fallback = cheapest_on_demand(offers)
        held = {offer.name: len(fleet.of(offer.name)) for offer in spot}
        horizon_s = max(offer.startup_s for offer in [*spot, fallback])
        kept = risk.survivors(horizon_s)
        weighed = self._weighed(spot, held, kept, risk)
        choice = self._choice(need, weighed, held, kept, fallback, risk)
        wanted = dict(zip([offer.name for offer in weighed], choice.machines, strict=True))
        if choice.on_demand and not any(wanted.values()):
            self._scout(wanted, weighed, risk)
        return self._actions(now_s, need, fleet, spot, fallback, wanted, choice)

    def _weighed(
        self, spot: list[Offer], held: dict[str, int], kept: Floats, risk: SpotRisk
    ) -> list[Offer]:
        """The pools worth combining: by price and what a machine there is expected to outlast."""
        top = risk.chain.top

        def rank(offer: Offer) -> float:
            place = risk.chain.pools.index(offer.name)
            loss = 1 - float(kept[place, top, top])
            chance = max(risk.chance(offer.name, held[offer.name] + 1), 1e-6)
            refusal = 0.0 if held[offer.name] else self.refusal_price * (1 - chance) / chance
            return offer.usd_per_h * (1 + refusal + self.short_price * loss)

        return sorted(spot, key=rank)[: self.pools_weighed]

    def _choice(
        self,
        need: int,
        weighed: list[Offer],
        held: dict[str, int],
        kept: Floats,
        fallback: Offer,
        risk: SpotRisk,
    ) -> Choice:
        levels = (0, *risk.chain.levels)
        extra = np.zeros((len(weighed), len(levels)))
        for row, offer in enumerate(weighed):
            for column, count in enumerate(levels):
                if count > held[offer.name]:
                    chance = max(risk.chance(offer.name, count), 1e-6)
                    extra[row, column] = self.refusal_price * (1 - chance) / chance
        prices = np.array([offer.usd_per_h for offer in weighed])
        question = Question(
            need=need,
            levels=levels,
            kept=_rounded(kept[[risk.chain.pools.index(offer.name) for offer in weighed]]),
            usd_per_h=tuple(prices),
            regions=tuple(offer.region for offer in weighed),
            extra_usd_per_h=_rounded((extra * prices[:, None])[None])[0],
            together=risk.chain.together,
            on_demand_usd_per_h=fallback.usd_per_h,
            short_usd_per_h=self.short_price * need * fallback.usd_per_h,
        )
        return choose(question)

    def _scout(self, wanted: dict[str, int], weighed: list[Offer], risk: SpotRisk) -> None:
        """While all is on demand, one spot machine where it is likeliest to be had: it learns when
        the market is fit to return to."""
        best = max(weighed, key=lambda offer: risk.chance(offer.name, 1), default=None)
        if best is not None and risk.chance(best.name, 1) >= self.scout_chance:
            wanted[best.name] = 1

    def _actions(
        self,
        now_s: float,
        need: int,
        fleet: Fleet,
        spot: list[Offer],
        fallback: Offer,
        wanted: dict[str, int],
        choice: Choice,
    ) -> list[Action]:
        """Launches first; then back goes what is not wanted, as long as enough others answer."""
        why = f"P(short) {choice.short:.1e} at ${choice.usd_per_h:.2f}/h"
        actions: list[Action] = []
        surplus = []
        for offer, count in [
            *((o, wanted.get(o.name, 0)) for o in spot),
            (fallback, choice.on_demand),
        ]:
            nodes = fleet.of(offer.name)
            if len(nodes) < count:
                actions.append(Launch(offer, count - len(nodes), why))
            surplus += nodes[count:]
        spare = fleet.ready(now_s) - need
        for node in sorted(
            surplus, key=lambda node: (node.ready_s <= now_s, -node.offer.usd_per_h)
        ):
            if node.ready_s <= now_s:
                if spare <= 0:
                    continue
                spare -= 1
            actions.append(Terminate(node.id, why))
        return actions


def _rounded(values: Floats) -> Table:
    """To three digits: a decision does not hang on noise, and alike moments ask the same
    question."""
    with np.errstate(divide="ignore"):
        digits = 2 - np.floor(np.log10(np.where(values > 0, values, 1.0)))
    scale = 10.0**digits
    return tuple(map(_rows, (np.rint(values * scale) / scale).tolist()))


def _rows(table: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table))
