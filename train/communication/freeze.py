"""When 1-bit Adam's variance stays as it is: after so many steps, or once it has become stable.

Stable is what the paper takes its warm-up's length from (Tang et al., ICML 2021): the 1-norm of the
variance is at least 0.96 of what it was 1 / (1 - beta2) steps before, looked at only once the
learning rate has risen. Norms are without Adam's bias towards zero, with which every young variance
would seem to grow.

The paper's windows are of a thousand steps; with beta2 = 0.95 they are of twenty, and a single
ratio says little: a norm that clipping holds at its limit passes in the first window, and one that
still falls passes by chance. So here the ratio has to hold for a whole window without a break.
"""

import torch
from torch import Tensor

from train.communication.transport import Transport

STABLE = 0.96
"""The paper's threshold: the least ratio of a stable variance's norm to the one a window before."""
UNDECIDED = 1 << 62
"""More steps than any run has."""


class Freeze:
    """The number of steps whose gradients are sent whole, and what it is decided by.

    given: that number, or None for the rule; beta2: of the variance; rises: steps in which the
    learning rate rises. The rule's state is live tensors, for they belong into a checkpoint: a run
    that goes on, and a worker that joins, have to freeze at the same step as the others.
    """

    def __init__(self, given: int | None, beta2: float, rises: int) -> None:
        self.given, self.beta2, self.rises = given, beta2, rises
        self.window = max(1, round(1 / (1 - beta2)))
        self._norms = torch.zeros(self.window, dtype=torch.float64)
        self._stable_steps = torch.zeros(1, dtype=torch.float64)
        self._decided = torch.zeros(1, dtype=torch.float64)
        self._agreed = 0.0

    @property
    def steps(self) -> int:
        """How many steps the variance changes in; UNDECIDED as long as that is not known."""
        return self.given if self.given is not None else int(self._decided) or UNDECIDED

    def agree(self, variance: Tensor, finished: int, link: Transport) -> None:
        """In step finished + 1: the norm after `finished` steps, as a mean over ranks, so that
        ranks that sum in another order cannot decide otherwise. It counts with `look`."""
        if self.steps == UNDECIDED and finished:
            norm = torch.tensor([float(variance.sum(dtype=torch.float64))], dtype=torch.float64)
            link.all_reduce(norm)
            self._agreed = float(norm) / link.size / (1 - self.beta2**finished)

    def look(self, step: int) -> None:
        """Step `step`, whose update is being made, is the last with whole gradients if the
        variance was stable before it, and in a window of steps."""
        if self.steps != UNDECIDED or step == 1:
            return
        place = (step - 1) % self.window
        before = float(self._norms[place])
        self._norms[place] = self._agreed
        if step - 1 <= max(self.window, self.rises) or self._agreed < STABLE * before:
            self._stable_steps.zero_()
            return
        self._stable_steps += 1
        if self._stable_steps >= self.window:
            self._decided.fill_(step)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep, live; nothing where the number is given."""
        if self.given is not None:
            return {}
        kept = {"norms": self._norms, "stable_steps": self._stable_steps, "step": self._decided}
        return {f"freeze/{name}": tensor for name, tensor in kept.items()}
