"""From a role's load to the number of replicas that must answer.

Tokens that will arrive, and tokens that wait, over what one replica serves. More is bought when
more was needed for a while, less is held when less was needed for a longer while and by a margin,
so that a steady load never goes back and forth: the need rises to the least that was asked for
during the up delay, and falls to the most of the down delay.
"""

import math
from dataclasses import dataclass, replace

from autoscale.loop.actions import RoleNeed
from autoscale.loop.forecast import Forecast
from autoscale.loop.signals import RoleLoad
from cluster.settings.autoscale import AutoscaleSettings, RoleScale

RATE_SHARE = 0.3  # how much one measurement of a replica's rate moves what is believed
SLOWER = 0.9  # a replica is reckoned so much slower when the promise was missed
BUSY_SHARE = 0.25  # of what a step served, what has to wait at both its ends to call it busy
BUSY_S = 5.0  # and so many seconds of what all serve
EPSILON = 1e-9


@dataclass(frozen=True)
class Wanted:
    """What one step would have asked for: at least `up` replicas, and `down` before any may go."""

    at_s: float
    up: int
    down: int


@dataclass(frozen=True)
class RoleMind:
    """What is remembered of a role. rate: tokens/s that one replica serves, 0 where unknown.
    settled_s: since when as many answer as were needed."""

    need: int
    rate: float
    forecast: Forecast = Forecast()
    wanted: tuple[Wanted, ...] = ()
    busy_s: float = 0.0  # when it last had work
    queued_tokens: int = 0
    ready: int = 0
    settled_s: float | None = None
    slower_s: float = -math.inf
    reason: str = "as found"


@dataclass(frozen=True)
class Moment:
    """One step of a role: from since_s to now_s; ready: replicas that answer now; horizon_s: until
    a machine bought now would."""

    now_s: float
    since_s: float
    ready: int
    horizon_s: float


def first_mind(scale: RoleScale, found: int, now_s: float) -> RoleMind:
    """When the loop starts, with so many machines of the role already there."""
    need = max(scale.floor, min(found, scale.cap))
    return RoleMind(need, scale.tokens_per_s, busy_s=now_s)


def think(
    mind: RoleMind, load: RoleLoad, at: Moment, scale: RoleScale, settings: AutoscaleSettings
) -> RoleMind:
    """The role after one more step."""
    mind = _measured(mind, load, at, scale, settings)
    forecast = mind.forecast.observe(at.now_s, load.arrived_tokens, at.since_s, at.horizon_s)
    works = bool(load.arrived_tokens or load.queued_tokens or load.running)
    mind = replace(
        mind,
        forecast=forecast,
        busy_s=at.now_s if works else mind.busy_s,
        queued_tokens=load.queued_tokens,
        ready=at.ready,
    )
    wanted = _wanted(mind, load, at, scale, settings)
    kept_s = at.now_s - max(settings.up_delay_s, settings.down_delay_s)
    old = sum(one.at_s < kept_s for one in mind.wanted)
    held = (*mind.wanted[max(0, old - 1) :], wanted)  # one older: the window is known to be full
    return _decided(replace(mind, wanted=held), at, scale, settings, works)


def told(mind: RoleMind, quantile: float, horizon_s: float) -> RoleNeed:
    """For the log."""
    rates = mind.forecast.rates
    return RoleNeed(
        mind.need,
        rates[-1] if rates else 0.0,
        mind.forecast.upper(horizon_s, quantile),
        mind.rate,
        mind.reason,
    )


def _measured(
    mind: RoleMind, load: RoleLoad, at: Moment, scale: RoleScale, settings: AutoscaleSettings
) -> RoleMind:
    """What one replica serves, as seen: while work waited from beginning to end, what was served is
    what they could. Where the promise was missed though all were there, a little less."""
    steady = mind.ready == at.ready > 0
    settled_s: float | None = None
    if steady and at.ready >= mind.need:
        settled_s = mind.settled_s if mind.settled_s is not None else at.now_s
    mind = replace(mind, settled_s=settled_s)
    served = load.arrived_tokens + mind.queued_tokens - load.queued_tokens
    if steady and served > 0 and _busy(mind, load, served):
        seen = served / (at.now_s - at.since_s) / at.ready
        rate = mind.rate + RATE_SHARE * (seen - mind.rate) if mind.rate else seen
        return replace(mind, rate=rate)
    late = settings.ttft_s > 0 and (load.ttft_p90_s or 0.0) > settings.ttft_s
    wait_s = max(settings.up_delay_s, 2 * (at.now_s - at.since_s))
    long_enough = settled_s is not None and at.now_s - max(settled_s, mind.slower_s) >= wait_s
    if late and long_enough and mind.rate:
        return replace(mind, rate=mind.rate * SLOWER, slower_s=at.now_s)
    return mind


def _busy(mind: RoleMind, load: RoleLoad, served: int) -> bool:
    """No replica can have been idle: at both ends of the step a good part of what was served in it
    waited, some seconds' worth, and all have something to do. One request that happens to wait
    whenever somebody looks says nothing, and taken for more it would make replicas look slower,
    their number grow, and each look slower still."""
    waited = min(mind.queued_tokens, load.queued_tokens)
    enough = max(BUSY_SHARE * served, BUSY_S * mind.rate * mind.ready)
    return waited >= enough and load.running >= mind.ready


def _wanted(
    mind: RoleMind, load: RoleLoad, at: Moment, scale: RoleScale, settings: AutoscaleSettings
) -> Wanted:
    """Replicas for this step's view of what comes and what waits, before any delay. What waits
    counts for no more than what comes: those bought for that will work it off as well."""
    if not mind.rate:
        one = 1 if load.queued_tokens else -1
        return Wanted(at.now_s, mind.need + max(0, one), mind.need + one)
    coming = mind.forecast.upper(at.horizon_s, settings.quantile)
    waiting = min(load.queued_tokens / settings.backlog_s, max(coming, mind.rate))
    each = mind.rate * settings.filled
    up = (coming + waiting) / each
    down = (coming * (1 + settings.band) + waiting) / each
    full = load.kv_used * at.ready / settings.kv_filled
    return Wanted(
        at.now_s, _whole(max(up, full)), _whole(max(down, full * (1 + settings.band), up))
    )


def _whole(replicas: float) -> int:
    return math.ceil(replicas - EPSILON)


def _decided(
    mind: RoleMind, at: Moment, scale: RoleScale, settings: AutoscaleSettings, works: bool
) -> RoleMind:
    """The need after delays and bounds, with its reason."""
    ups = _window(mind.wanted, at.now_s - settings.up_delay_s)
    downs = _window(mind.wanted, at.now_s - settings.down_delay_s)
    rise = min((one.up for one in ups), default=mind.need)
    fall = max((one.down for one in downs), default=mind.need)
    need, reason = mind.need, mind.reason
    if rise > mind.need:
        need, reason = rise, f"{rise} needed for {settings.up_delay_s:g} s"
    elif fall < mind.need:
        need, reason = fall, f"no more than {fall} needed for {settings.down_delay_s:g} s"
    idle_s = at.now_s - mind.busy_s
    if not works and idle_s >= settings.zero_after_s:
        need, reason = 0, f"no work for {settings.zero_after_s:g} s"
    elif need < 1:
        wakes = mind.need == 0 and works
        need = 1 if works or mind.need else 0
        reason = "work has come" if wakes else mind.reason
    if need < scale.floor:
        need, reason = scale.floor, "the floor"
    elif need > scale.cap:
        need, reason = scale.cap, f"the cap; {need} would be needed"
    return replace(mind, need=need, reason=reason)


def _window(wanted: tuple[Wanted, ...], since_s: float) -> list[Wanted]:
    """What was asked for since then; nothing if the steps do not reach back so far."""
    if wanted[0].at_s > since_s + EPSILON:
        return []
    return [one for one in wanted if one.at_s >= since_s - EPSILON]
