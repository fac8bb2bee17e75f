"""A mixture of experts over several ranks that drops no token (MegaBlocks, Gale et al. 2022), with
a parallelism that can change from step to step without moving a weight (Tutel, Hwang et al. 2022).

Weights have one layout for all degrees of parallelism: with as many experts as ranks or more, a
rank has whole ones; with fewer, the ranks of an expert have a slice each of its width. The degree
says to how many ranks of its expert a row travels (Tutel's r). At the highest each slice gets a
copy, and no weight moves; at 1 one rank gets it, which gathers the expert's other slices before;
between them a row goes to r ranks, each with an r-th of the expert. At 0 no row travels: everybody
gathers all experts for its own rows, which costs by weights instead of tokens. `Tuner` learns which
is fastest at how many tokens.

An expert's rows are one product each: no capacity, no padding, nothing to drop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from train.parallel.exchange import exchange_counts, gather_from, gather_weights, send_rows
from train.parallel.routing import Routing, combine, put_back, route, sort_by_expert, take


class Placement(NamedTuple):
    """Where experts live: `local` whole ones a rank, or one in `slices` ranks."""

    experts: int
    size: int
    local: int
    slices: int

    @classmethod
    def of(cls, experts: int, size: int) -> "Placement":
        """ValueError unless one number divides the other."""
        if experts % size and size % experts:
            raise ValueError(
                f"mesh.expert = {size} ranks cannot share {experts} experts evenly; a divisor or a "
                f"multiple of {experts} would be accepted"
            )
        return cls(experts, size, max(experts // size, 1), max(size // experts, 1))

    @property
    def degrees(self) -> tuple[int, ...]:
        """Of parallelism that an expert's ranks allow, ascending."""
        return (0, *(n for n in range(1, self.slices + 1) if self.slices % n == 0))


class Experts(nn.Module):
    """SwiGLU experts behind a router, this rank's share of them.

    router (experts, hidden) is on every rank. gate, up (local, ff / slices, hidden) and down
    (local, hidden, ff / slices) are this rank's: experts rank x local on, or slice rank % slices of
    expert rank // slices.
    """

    def __init__(
        self,
        hidden: int,
        ff: int,
        experts: int,
        top_k: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.group, self.top_k = group, top_k
        self.placement = at = Placement.of(experts, group.size() if group is not None else 1)
        if ff % at.slices:
            raise ValueError(f"model.ff = {ff} is not divisible by {at.slices} ranks of an expert")
        self.router = nn.Parameter(torch.empty(experts, hidden))
        self.gate = nn.Parameter(torch.empty(at.local, ff // at.slices, hidden))
        self.up = nn.Parameter(torch.empty(at.local, ff // at.slices, hidden))
        self.down = nn.Parameter(torch.empty(at.local, hidden, ff // at.slices))

    def forward(self, x: Tensor, degree: int | None = None) -> tuple[Tensor, Routing]:
        """x (tokens, hidden), this rank's; the mixture of its experts' answers, and the routing.
        All ranks call it, with the same degree (None: the highest); their tokens may differ in
        number. ValueError for a degree that there is not."""
        if degree is None:
            degree = self.placement.slices
        elif degree not in self.placement.degrees:
            known = ", ".join(map(str, self.placement.degrees))
            raise ValueError(f"a degree of parallelism of {degree}: {known} are accepted")
        routing = route(x, self.router, self.top_k)
        order = sort_by_expert(routing.experts, self.placement.experts)
        rows = x[order.source]
        if self.group is None:
            answers = grouped(rows, order.counts.tolist(), self.gate, self.up, self.down)
        elif degree:
            answers = self._tokens_travel(rows, order.counts, degree)
        else:
            answers = self._weights_travel(rows, order.counts)
        return combine(answers, routing, order), routing

    def load_whole(self, whole: "Experts") -> None:
        """This rank's share of experts that one process holds."""
        rank, at = (self.group.rank() if self.group is not None else 0), self.placement
        first, width = rank * at.local // at.slices, self.gate.shape[1]
        mine, part = slice(first, first + at.local), slice(0, width)
        if at.slices > 1:
            part = slice(rank % at.slices * width, (rank % at.slices + 1) * width)
        with torch.no_grad():
            self.router.copy_(whole.router)
            self.gate.copy_(whole.gate[mine, part])
            self.up.copy_(whole.up[mine, part])
            self.down.copy_(whole.down[mine, :, part])

    def _tokens_travel(self, rows: Tensor, counts: Tensor, degree: int) -> Tensor:
        """Rows go to `degree` ranks of each of their experts, and what comes back is added. Ranks
        gather what they lack of their part of the expert before."""
        assert self.group is not None
        at, together = self.placement, self.placement.slices // degree
        parts = self._joined(together)
        per_rank = counts.view(-1, at.local).repeat_interleave(at.slices, 0)
        # Of ranks that have the same part, each gets the rows of every so manieth rank.
        served = torch.arange(at.size) % together == self.group.rank() % together
        per_rank = per_rank * served.unsqueeze(1)
        sent = per_rank.sum(1).tolist()
        theirs = exchange_counts(per_rank, self.group)
        received = theirs.sum(1).tolist()
        if degree > 1:
            of_experts = torch.split(rows, counts.tolist())
            rows = torch.cat([part for part in of_experts for _ in range(degree)])
        arrived = send_rows(rows, sent, received, self.group)
        local = torch.arange(at.local).repeat(at.size).repeat_interleave(theirs.flatten())
        by_expert = local.argsort(stable=True)
        done = grouped(take(arrived, by_expert), theirs.sum(0).tolist(), *parts)
        home = send_rows(put_back(done, by_expert), received, sent, self.group)
        if degree == 1:
            return home
        copies = torch.split(home, [n for n, ours in zip(sent, served, strict=True) if ours])
        groups = (copies[n : n + degree] for n in range(0, len(copies), degree))
        return torch.cat([torch.stack(group).sum(0) for group in groups])

    def _joined(self, together: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's slices and those of its neighbours, side by side, where so many have a part
        of an expert together."""
        if together == 1:
            return self.gate, self.up, self.down
        assert self.group is not None
        first = self.group.rank() // together * together
        peers = range(first, first + together)
        held, group = (self.gate, self.up, self.down), self.group
        gate, up, down = (gather_from(weight, peers, group) for weight in held)
        width = self.gate.shape[2]
        gate, up = (w.reshape(1, -1, width) for w in (gate, up))
        return gate, up, down.permute(1, 2, 0, 3).reshape(1, width, -1)

    def _weights_travel(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Every rank gathers all experts."""
        assert self.group is not None
        at, width = self.placement, rows.shape[1]
        gate, up, down = (gather_weights(w, self.group) for w in (self.gate, self.up, self.down))
        if at.slices > 1:
            gate, up = (w.reshape(at.experts, -1, width) for w in (gate, up))
            down = down.view(at.experts, at.slices, width, -1).transpose(1, 2)
        return grouped(
            rows,
            counts.tolist(),
            gate.reshape(at.experts, -1, width),
            up.reshape(at.experts, -1, width),
            down.reshape(at.experts, width, -1),
        )


def grouped(rows: Tensor, counts: list[int], gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """rows (sum of counts, hidden), the first expert's first; each through its own SwiGLU."""
    parts = []
    # Unbound at once: the gradient of each one taken by its index would be of all experts' size.
    weights = zip(gate.unbind(), up.unbind(), down.unbind(), strict=True)
    for part, (opening, raising, lowering) in zip(torch.split(rows, counts), weights, strict=True):
        inner = functional.silu(part @ opening.T) * (part @ raising.T)
        parts.append(inner @ lowering.T)
    return torch.cat(parts)


class Tuner:
    """Which degree is fastest for how many tokens, learnt while training goes on.

    Numbers of tokens fall into buckets of a factor of two. Each degree is tried `tries` times in a
    bucket, then the one with the least time is taken. All ranks are told the same times (the
    slowest rank's), so all choose alike.
    """

    def __init__(self, degrees: Sequence[int], tries: int = 2) -> None:
        """degrees: `Placement.degrees`."""
        self._degrees, self._tries = tuple(degrees), tries
        self._seen: dict[int, dict[int, list[float]]] = {}

    def choose(self, tokens: int) -> int:
        """For a step of so many tokens."""
        seen = self._bucket(tokens)
        untried = [degree for degree in self._degrees if len(seen[degree]) < self._tries]
        return untried[0] if untried else min(self._degrees, key=lambda degree: min(seen[degree]))

    def tell(self, tokens: int, degree: int, seconds: float) -> None:
        """How long a step took. Only the fastest of each degree counts: what a step waits for
        besides makes it slower, never faster."""
        self._bucket(tokens)[degree].append(seconds)

    def _bucket(self, tokens: int) -> dict[int, list[float]]:
        return self._seen.setdefault(tokens.bit_length(), {d: [] for d in self._degrees})
