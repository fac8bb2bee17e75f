"""What to do with each live sequence before a deadline: a multiple-choice knapsack.

Each sequence takes one of its ways out: it finishes here, its KV crosses the link (as it is, as a
KV policy would keep it, or quantised), or it is computed again elsewhere. Least seconds of compute
spent again, such that what crosses fits into the time that is left. Up to EXACT sequences that
compete for the link the answer is the optimum (a frontier of undominated states); beyond that link
times are rounded up to a quantum that does not depend on the deadline, so that a later deadline
never costs more. SpotServe (Miao et al., ASPLOS 2024) commits tokens for as long as the grace
period leaves time to move them; the same slack is `Plan.link_s` against the deadline here. No
torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Choice = Literal["finish", "pages", "kept", "int8", "int4", "replay"]
Carried = Literal["pages", "kept", "int8", "int4"]

EXACT = 10  # sequences; 4 ways each make a frontier of at most a million states, usually hundreds
# What bits lost count as, in shares of the work of computing the KV again: int4 is believed ten
# times as bad as int8, about what each did to perplexity as a cache format (docs/operations.md).
LOST = {"int8": 0.01, "int4": 0.1}
QUANTA = 8192  # of the link time that the largest way of every sequence would take


@dataclass(frozen=True)
class Movable:
    """A live sequence. recompute_tokens: what computing its KV again costs, in tokens at an empty
    context (serve.engine.cost). remaining_tokens: at most to come; decode_tokens_per_s: here.
    carried_bytes: the ways its KV may cross, with their bytes; empty where it must not.
    """

    request_id: str
    recompute_tokens: float
    remaining_tokens: int
    decode_tokens_per_s: float
    carried_bytes: Mapping[Carried, int]


@dataclass(frozen=True)
class Terms:
    """What moving costs. move_s: of the link, for each sequence besides its bytes.
    prefill_tokens_per_s: of whoever computes again. codec_bytes_per_s: of KV that a codec packs
    and unpacks. All positive, move_s at least 0."""

    link_bytes_per_s: float
    move_s: float
    prefill_tokens_per_s: float
    codec_bytes_per_s: float


@dataclass(frozen=True)
class Step:
    """What happens to one sequence: seconds of the link, and of compute that is spent again or, by
    lost bits, in part in vain."""

    request_id: str
    choice: Choice
    link_s: float
    cost_s: float


@dataclass(frozen=True)
class Plan:
    """One step for each sequence. Those that cross come first, in the order in which to send them:
    what saves most compute for a second of the link goes first, so that a link slower than
    told loses the least."""

    steps: tuple[Step, ...]
    link_s: float
    cost_s: float

    @property
    def moves(self) -> tuple[Step, ...]:
        """The steps that cross the link, first to go first."""
        return tuple(step for step in self.steps if step.choice not in ("finish", "replay"))


def ways(sequence: Movable, terms: Terms, deadline_s: float) -> list[Step]:
    """All that may be done with a sequence by itself; replay is always among it."""
    again_s = sequence.recompute_tokens / terms.prefill_tokens_per_s
    found = [Step(sequence.request_id, "replay", 0.0, again_s)]
    if sequence.remaining_tokens <= deadline_s * sequence.decode_tokens_per_s:
        found.append(Step(sequence.request_id, "finish", 0.0, 0.0))
    for choice, size_bytes in sequence.carried_bytes.items():
        link_s = terms.move_s + size_bytes / terms.link_bytes_per_s
        cost_s = 0.0
        if choice in LOST:
            codec_s = sequence.carried_bytes.get("pages", 0) / terms.codec_bytes_per_s
            cost_s = codec_s + LOST[choice] * again_s
        found.append(Step(sequence.request_id, choice, link_s, cost_s))
    return found


def plan(sequences: Sequence[Movable], terms: Terms, deadline_s: float) -> Plan:
    """The cheapest choice for every sequence whose link times sum to at most `deadline_s`.

    ValueError for a sequence named twice. A deadline in the past leaves only replay.
    """
    if len({s.request_id for s in sequences}) < len(sequences):
        raise ValueError("a sequence is named twice; each may be moved once")
    left_s = max(deadline_s, 0.0)
    every = [ways(sequence, terms, left_s) for sequence in sequences]
    longest_s = sum(max(step.link_s for step in options) for options in every)
    groups = [_undominated(options) for options in every]
    contested = [options for options in groups if len(options) > 1]
    solve = _exact if len(contested) <= EXACT else _rounded
    chosen = {step.request_id: step for step in solve(contested, left_s, longest_s)}
    steps = [chosen.get(options[0].request_id, options[0]) for options in groups]
    return _ordered(steps, sequences, terms)


def _undominated(options: list[Step]) -> list[Step]:
    """Those that no other beats in both link and cost, the least link time first, which is none."""
    kept: list[Step] = []
    for step in sorted(options, key=lambda s: (s.link_s, s.cost_s)):
        if not kept or step.cost_s < kept[-1].cost_s:
            kept.append(step)
    return kept


def _exact(groups: list[list[Step]], deadline_s: float, _: float) -> list[Step]:
    """The optimum: all undominated pairs of link and cost, one sequence after the other."""
    link = cost = np.zeros(1)
    back: list[NDArray[np.int64]] = []
    for options in groups:
        links = (link[:, None] + [s.link_s for s in options]).ravel()
        costs = (cost[:, None] + [s.cost_s for s in options]).ravel()
        fits = np.flatnonzero(links <= deadline_s)
        order = fits[np.lexsort((costs[fits], links[fits]))]
        best = np.minimum.accumulate(costs[order])
        first = np.r_[True, best[1:] < best[:-1]]
        keep = order[first]
        link, cost = links[keep], costs[keep]
        back.append(keep)
    at, steps = len(link) - 1, list[Step]()  # the last one costs least
    for options, keep in zip(reversed(groups), reversed(back), strict=True):
        at, option = divmod(int(keep[at]), len(options))
        steps.append(options[option])
    return steps


def _rounded(groups: list[list[Step]], deadline_s: float, longest_s: float) -> list[Step]:
    """The optimum over link times rounded up to a quantum: never over the deadline, rarely dear."""
    quantum_s = longest_s / QUANTA
    room = int(min(deadline_s * (1 - 1e-9) / quantum_s, QUANTA + len(groups)))
    cost = np.zeros(room + 1)
    taken = np.zeros((len(groups), room + 1), np.int8)
    for row, options in zip(taken, groups, strict=True):
        best = np.full(room + 1, np.inf)
        for number, step in enumerate(options):
            quanta = int(np.ceil(step.link_s / quantum_s))
            if quanta > room:
                continue
            candidate = cost[: room + 1 - quanta] + step.cost_s
            better = candidate < best[quanta:]
            best[quanta:][better] = candidate[better]
            row[quanta:][better] = number
        cost = best
    at, steps = room, list[Step]()
    for row, options in zip(taken[::-1], reversed(groups), strict=True):
        step = options[row[at]]
        at -= int(np.ceil(step.link_s / quantum_s))
        steps.append(step)
    return steps


def _ordered(steps: list[Step], sequences: Sequence[Movable], terms: Terms) -> Plan:
    link_s, cost_s = sum(s.link_s for s in steps), sum(s.cost_s for s in steps)
    again_s = {s.request_id: s.recompute_tokens / terms.prefill_tokens_per_s for s in sequences}

    def worth(step: Step) -> tuple[bool, float, str]:
        saved_s = again_s[step.request_id] - step.cost_s
        return (
            step.choice in ("finish", "replay"),
            -saved_s / step.link_s if step.link_s else 0.0,
            step.request_id,
        )

    return Plan(tuple(sorted(steps, key=worth)), link_s, cost_s)
