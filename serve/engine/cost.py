"""What a step costs, in tokens: one token at an empty context costs 1, deeper ones more.

Attention over an earlier context of `half_context_tokens` costs as much as all the linears of a
token, so a chunk deep inside a long prompt is slower than one at its start. Budgets are counted in
this unit, which keeps every step about equally long (Sarathi-Serve's stall-free batching, with the
attention term made explicit). Called by the scheduler.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepCost:
    """cost(start, stop) = n + (context tokens attended by the n tokens) / half_context_tokens.

    `half_context_tokens` may be infinite: then only tokens count.
    """

    half_context_tokens: float = math.inf

    def of(self, start: int, stop: int) -> float:
        """Cost of computing positions [start, stop) of one sequence."""
        tokens = stop - start
        return tokens + tokens * (start + stop) / 2 / self.half_context_tokens

    def affordable(self, start: int, budget: float) -> int:
        """The most tokens from position `start` on whose cost stays within `budget` (>= 0)."""
        if budget <= 0:
            return 0
        if math.isinf(self.half_context_tokens):
            return int(budget)
        # n^2/2h + n(1 + start/h) = budget, solved for n >= 0; then rounding is made good.
        half = self.half_context_tokens
        slope = 1 + start / half
        tokens = int(half * (math.sqrt(slope * slope + 2 * budget / half) - slope))
        while self.of(start, start + tokens) > budget:
            tokens -= 1
        while self.of(start, start + tokens + 1) <= budget:
            tokens += 1
        return tokens
