"""What a spot market lets one see: launches, notices, losses, prices. Fed to a policy's memory in
the order of their times, by the simulator as by whoever watches a real cloud."""

from dataclasses import dataclass
from typing import Literal

EventKind = Literal["launch_ok", "launch_fail", "held", "notice", "preempt", "price"]


@dataclass(frozen=True)
class SpotEvent:
    """One observation of a pool (the machines of one offer).

    value is, by kind: launch_ok, held: machines of the pool held now (the market has at least so
    many); launch_fail: machines held when one more was refused; preempt: machines left after the
    loss (the market has no more); notice: seconds until the machine goes; price: dollars per hour.
    """

    t_s: float
    pool: str
    kind: EventKind
    value: float
