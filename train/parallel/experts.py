"""A mixture of experts over several ranks that drops no token (MegaBlocks, Gale et al. 2022), with
a parallelism that can change from step to step without moving a weight (Tutel, Hwang et al. 2022).

Weights have one layout for all modes: with as many experts as ranks or more, a rank has whole ones;
with fewer, the ranks of an expert have a slice each of its width. "tokens": rows travel to their
experts and back, which costs by tokens. "weights": everybody gathers all experts for its own rows,
which costs by weights. `Tuner` learns which is faster at how many tokens.

An expert's rows are one product each: no capacity, no padding, nothing to drop.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from train.parallel.exchange import exchange_counts, gather_weights, send_rows
from train.parallel.routing import Routing, combine, route, sort_by_expert

Mode = Literal["tokens", "weights"]
MODES: tuple[Mode, ...] = get_args(Mode)


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

    def forward(self, x: Tensor, mode: Mode = "tokens") -> tuple[Tensor, Routing]:
        """x (tokens, hidden), this rank's; the mixture of its experts' answers, and the routing.
        All ranks call it, with the same mode; their tokens may differ in number."""
        routing = route(x, self.router, self.top_k)
        order = sort_by_expert(routing.experts, self.placement.experts)
        rows = x[order.source]
        if self.group is None:
            answers = grouped(rows, order.counts.tolist(), self.gate, self.up, self.down)
        elif mode == "tokens":
            answers = self._tokens_travel(rows, order.counts)
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

    def _tokens_travel(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows go to the ranks of their experts; each slice of an expert gets a copy, and what
        comes back from slices is added."""
        assert self.group is not None
        at = self.placement
        per_rank = counts.view(-1, at.local).repeat_interleave(at.slices, 0)
        sent = per_rank.sum(1).tolist()
        theirs = exchange_counts(per_rank, self.group)
        received = theirs.sum(1).tolist()
        if at.slices > 1:
            parts = torch.split(rows, counts.tolist())
            rows = torch.cat([part for part in parts for _ in range(at.slices)])
        arrived = send_rows(rows, sent, received, self.group)
        local = torch.arange(at.local).repeat(at.size).repeat_interleave(theirs.flatten())
        by_expert = local.argsort(stable=True)
        done = grouped(arrived[by_expert], theirs.sum(0).tolist(), self.gate, self.up, self.down)
        back = torch.empty_like(done).index_copy(0, by_expert, done)
        home = send_rows(back, received, sent, self.group)
        if at.slices == 1:
            return home
        copies = torch.split(home, sent)
        groups = (copies[n : n + at.slices] for n in range(0, len(copies), at.slices))
        return torch.cat([torch.stack(group).sum(0) for group in groups])

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
    for index, part in enumerate(torch.split(rows, counts)):
        inner = functional.silu(part @ gate[index].T) * (part @ up[index].T)
        parts.append(inner @ down[index].T)
    return torch.cat(parts)


class Tuner:
    """Which mode is fastest for how many tokens, learnt while training goes on.

    Numbers of tokens fall into buckets of a factor of two. Each mode is tried `tries` times in a
    bucket, then the one with the least time is taken. All ranks are told the same times (the
    slowest rank's), so all choose alike.
    """

    def __init__(self, tries: int = 2) -> None:
        self._tries = tries
        self._seen: dict[int, dict[Mode, list[float]]] = {}

    def choose(self, tokens: int) -> Mode:
        """For a step of so many tokens."""
        seen = self._seen.setdefault(tokens.bit_length(), {mode: [] for mode in MODES})
        untried = [mode for mode in MODES if len(seen[mode]) < self._tries]
        return untried[0] if untried else min(MODES, key=lambda mode: min(seen[mode]))

    def tell(self, tokens: int, mode: Mode, seconds: float) -> None:
        """How long a step took. Only the fastest of each mode counts: what a step waits for besides
        makes it slower, never faster."""
        seen = self._seen.setdefault(tokens.bit_length(), {mode: [] for mode in MODES})
        seen[mode].append(seconds)
