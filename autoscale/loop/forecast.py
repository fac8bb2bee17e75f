"""How many tokens per second will arrive when a machine bought now could answer.

A smoothed level and a smoothed slope that is damped ahead (as in Holt's method, but the level does
not follow the slope: it would swing through after a jump), over uneven steps; on top of it the
given quantile of what that was wrong by lately, at just that horizon. Without a season: over the
minutes that a machine takes to start, a day's swing is a straight line. Values are immutable:
observing makes a new one.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

LEVEL_S = 45.0  # how fast the level follows
TREND_S = 180.0  # how fast the trend does, and how long one is believed to go on
ERRORS = 64  # forecasts remembered with what came of them
PEAK = 6  # steps whose largest rate bounds the forecast
SURGE = 1.5  # no forecast is above so many times what was seen


@dataclass(frozen=True)
class Forecast:
    """level: tokens per second; trend: tokens per second, each second. made: forecasts that await
    their time, as (for when, how much). errors: what came above (or below, negative) them."""

    level: float | None = None
    trend: float = 0.0
    at_s: float = 0.0
    made: tuple[tuple[float, float], ...] = ()
    errors: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()

    def observe(self, now_s: float, tokens: int, since_s: float, horizon_s: float) -> "Forecast":
        """After `tokens` arrived from since_s to now_s (later than it)."""
        step_s = now_s - since_s
        assert step_s > 0, "time goes on between two observations"
        rate = tokens / step_s
        if self.level is None:
            return Forecast(rate, 0.0, now_s, ((now_s + horizon_s, rate),), (), (rate,))
        level = self.level + (1 - math.exp(-step_s / LEVEL_S)) * (rate - self.level)
        share = 1 - math.exp(-step_s / TREND_S)
        trend = self.trend + share * ((level - self.level) / step_s - self.trend)
        due = bisect_left(self.made, (now_s, math.inf))
        errors = [level - guess for _, guess in self.made[:due]]
        after = Forecast(
            level,
            trend,
            now_s,
            self.made[due:],
            (*self.errors, *errors)[-ERRORS:],
            (*self.rates, rate)[-PEAK:],
        )
        guess = (now_s + horizon_s, after.expected(horizon_s))
        return Forecast(level, trend, now_s, (*after.made, guess), after.errors, after.rates)

    def expected(self, horizon_s: float) -> float:
        """Tokens per second so long from the last observation, as likely too high as too low."""
        return max(0.0, (self.level or 0.0) + self._drift(horizon_s))

    def upper(self, horizon_s: float, quantile: float) -> float:
        """What arrivals stay below with about this chance. At least what arrives now, for machines
        that are there need not be foreseen; at most SURGE times what was seen, so that one surprise
        cannot buy without end."""
        if self.level is None:
            return 0.0
        margin = 0.0
        if self.errors:
            ordered = sorted(self.errors)
            margin = max(0.0, ordered[min(len(ordered) - 1, int(quantile * len(ordered)))])
        most = SURGE * max(self.level, *self.rates)
        return min(most, max(self.level, self.expected(horizon_s) + margin))

    def _drift(self, ahead_s: float) -> float:
        """What the trend adds, each second of it worth less than the one before."""
        return self.trend * TREND_S * (1 - math.exp(-ahead_s / TREND_S))
