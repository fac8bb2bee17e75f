"""Policies over one market, fitted on its first part and scored on its last: what `sanderling
simulate` prints and the proofs hold."""

from dataclasses import dataclass
from typing import NamedTuple

from autoscale.simulate.market import Market
from autoscale.simulate.replay import Report, replay
from autoscale.spot.basic import EvenSpreadPolicy, OnDemandPolicy, Refusals, SinglePoolPolicy
from autoscale.spot.belief import SpotRisk
from autoscale.spot.calibrate import Outcome, calibrate
from autoscale.spot.hedge import HedgePolicy, Placer
from autoscale.spot.levels import Chain, fit, levels_for
from autoscale.spot.mixed import MixedPolicy

POLICIES = ("mixed", "spothedge", "even_spread", "single", "on_demand")


@dataclass(frozen=True)
class Study:
    """A market, what is needed of it, and where its fitted part ends (a step)."""

    market: Market
    need: int
    fitted: int

    def __post_init__(self) -> None:
        if not 2 <= self.fitted < self.market.steps:
            raise ValueError(
                f"the fitted part ends at step {self.fitted}; it takes at least 2 steps and less "
                f"than the trace's {self.market.steps}"
            )

    def chain(self) -> Chain:
        """The risk model of the fitted part; what follows it is not looked at."""
        spot = self.market.spot
        history = self.market.capacity[: self.fitted]
        return fit(
            history,
            tuple(offer.name for offer in spot),
            tuple(offer.region for offer in spot),
            levels_for(self.need, int(history.max())),
            self.market.period_s,
        )

    def mixed(self, policy: MixedPolicy, *, log: bool = False) -> Report:
        """Ours, scored on the last part; it lives through the first, too."""
        return self._run(policy, SpotRisk(self.chain()), log)

    def hedge(self, over: int, *, log: bool = False) -> Report:
        """SpotHedge with so many machines beyond the need."""
        pools = tuple(offer.name for offer in self.market.spot)
        return self._run(HedgePolicy(over), Placer(pools), log)

    def even(self, *, log: bool = False) -> Report:
        return self._run(EvenSpreadPolicy(), Refusals(), log)

    def single(self, pool: str, *, log: bool = False) -> Report:
        return self._run(SinglePoolPolicy(pool), Refusals(), log)

    def on_demand(self, *, log: bool = False) -> Report:
        return self._run(OnDemandPolicy(), Refusals(), log)

    def best_single(self) -> Report:
        """The spot pool that answered most, in hindsight."""
        reports = [self.single(offer.name) for offer in self.market.spot]
        return max(reports, key=lambda report: report.availability)

    def calibrated(self, target: float) -> MixedPolicy:
        """Ours for a target availability, from the fitted part alone."""
        history = self.market.part(0, self.fitted)
        chain = self.chain()

        def outcome(policy: MixedPolicy) -> Outcome:
            report = replay(history, policy, SpotRisk(chain), self.need, scored_from=2)
            return Outcome(report.availability, report.cost)

        return calibrate(target, outcome)

    def _run(self, policy: object, memory: object, log: bool) -> Report:
        return replay(
            self.market,
            policy,  # type: ignore[arg-type]
            memory,  # type: ignore[arg-type]
            self.need,
            scored_from=self.fitted,
            log=log,
        )


class Duel(NamedTuple):
    """One point of a rival's curve against ours. cheaper: our cheapest point at least as available.
    better: our most available point that costs no more; None where there is none."""

    rival: Report
    cheaper: Report | None
    better: Report | None

    @property
    def wins(self) -> bool:
        """Cheaper at its availability, and more available at its cost; as available counts where it
        has missed no step and nothing can be better."""
        if self.cheaper is None or self.better is None:
            return False
        perfect = self.rival.served == self.rival.steps
        more = self.better.availability > self.rival.availability
        return self.cheaper.cost < self.rival.cost and (
            more or (perfect and self.better.served == self.better.steps)
        )


def duel(rival: Report, ours: list[Report]) -> Duel:
    """Hold a rival's point against our curve."""
    enough = [report for report in ours if report.availability >= rival.availability]
    affordable = [report for report in ours if report.cost <= rival.cost]
    return Duel(
        rival,
        min(enough, key=lambda report: report.cost, default=None),
        max(affordable, key=lambda report: report.availability, default=None),
    )
