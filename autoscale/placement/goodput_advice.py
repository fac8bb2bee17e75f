"""Whether to compute prompts and answers on replicas apart, said in a sentence with its numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoscale.placement.demand import Slo
from autoscale.placement.goodput import Replica, colocated, disaggregated, goodput


@dataclass(frozen=True)
class Advice:
    """Goodput in requests per second of the same number of replicas, together and at the best
    split; prefills and decodes: that split."""

    together_per_s: float
    apart_per_s: float
    prefills: int
    decodes: int

    @property
    def disaggregate(self) -> bool:
        return self.apart_per_s > self.together_per_s

    def sentence(self) -> str:
        split = f"{self.prefills} prefill and {self.decodes} decode"
        together = f"{self.prefills + self.decodes} replicas that do both"
        apart, both = f"{self.apart_per_s:.2f} requests/s", f"{self.together_per_s:.2f}"
        if self.disaggregate:
            return (
                f"Disaggregate: {split} replicas serve {apart} within the SLO, {together} {both}."
            )
        return (
            f"Don't disaggregate: {together} serve {both} requests/s within the SLO, "
            f"the best split ({split}) {apart}"
        )


def advise(
    replica: Replica,
    count: int,
    lengths: Sequence[tuple[int, int]],
    slo: Slo,
    *,
    handover_s: Callable[[int], float] = lambda tokens: 0.0,
    seed: int = 0,
) -> Advice:
    """Every split of `count` (two or more) like replicas, and all of them together. ValueError for
    fewer: one replica cannot be split."""
    if count < 2:
        raise ValueError(f"count = {count}: at least two replicas are needed to keep phases apart")
    longest = max(lengths)
    most = count * 2.0 / replica.times.prompt_s([longest[0]])
    together = goodput(
        lambda arrivals: colocated(arrivals, [replica] * count), lengths, slo, most=most, seed=seed
    )
    best = Advice(together, -1.0, 0, 0)
    for prefills in range(1, count):
        decodes = count - prefills
        apart = goodput(
            lambda arrivals, p=prefills, d=decodes: disaggregated(  # type: ignore[misc]
                arrivals, [replica] * p, [replica] * d, handover_s
            ),
            lengths,
            slo,
            most=most,
            seed=seed,
        )
        if apart > best.apart_per_s:
            best = Advice(together, apart, prefills, decodes)
    return best
