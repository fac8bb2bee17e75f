"""How long an engine's steps take: a fixed part and one for each token of work, as of late.

Least squares over the steps so far, each counting DECAY of the one after it. Kept by loop.py, asked
by whoever has to know in advance (a drain with a deadline). No torch.
"""

DECAY = 0.98  # of the weight of a step with each further one: the last fifty or so count


class Pace:
    """Steps noted so far; before the first, everything is believed to take no time."""

    def __init__(self) -> None:
        self._weight = self._cost = self._seconds = self._cost_2 = self._cost_seconds = 0.0

    def note(self, cost: float, seconds: float) -> None:
        """A step of `cost` (serve.engine.cost, tokens at an empty context) took so long."""
        self._weight = self._weight * DECAY + 1
        self._cost = self._cost * DECAY + cost
        self._seconds = self._seconds * DECAY + seconds
        self._cost_2 = self._cost_2 * DECAY + cost * cost
        self._cost_seconds = self._cost_seconds * DECAY + cost * seconds

    def step_s(self, cost: float) -> float:
        """How long a step of that cost should take."""
        fixed_s, token_s = self._line()
        return fixed_s + token_s * cost

    def _line(self) -> tuple[float, float]:
        """Seconds of any step, and of each token of it; neither negative.

        Where all steps cost about the same, or larger ones took less, nothing tells the two parts
        apart: then all of it is put down to the tokens, which makes work dear rather than cheap.
        """
        if not self._cost:
            return 0.0, 0.0
        spread = self._weight * self._cost_2 - self._cost**2
        if spread > 0.01 * self._weight * self._cost_2:
            together = self._weight * self._cost_seconds - self._cost * self._seconds
            token_s = together / spread
            fixed_s = (self._seconds - token_s * self._cost) / self._weight
            if token_s > 0 and fixed_s >= 0:
                return fixed_s, token_s
        return 0.0, self._seconds / self._cost
