"""One worker's weights and the parameter servers that keep them (HetPipe, Park et al., ATC 2020):
a whole model's among all workers, or a stage's among the workers that have the same stage.

Every member is also the server of an equal share of masters and moments, and writes this share into
checkpoints.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train.checkpoint.piece import Piece, dtype_name
from train.checkpoint.reader import Checkpoint, read_checked
from train.heterogeneous.hetpipe_server import Pulled, Rule, Shard, Stretch
from train.heterogeneous.hetpipe_wire import Door, Servers, open_doors, stretches
from train.job import Job
from train.layout import FlatModel
from train.parallel.zero_flat import best_name
from train.world import World


class Member:
    """flat: the weights; rate: the learning rate after so many finished steps; facts: what all
    members told with the wave that lies bound + 1 before this one's clock, (members, FACTS), or
    None before there was one; own: the stretch that this process is the server of."""

    def __init__(self, job: Job, flat: FlatModel, rate: Callable[[int], float]) -> None:
        assert job.workers.staleness is not None
        self.job, self.flat, self.rate = job, flat, rate
        self.bound = job.workers.staleness
        self.facts: Tensor | None = None
        # Plain SGD's updates are known before a server has made them: nobody waits for its own.
        self._anticipates = job.optimizer.name == "sgd" and not job.optimizer.beta1
        self._own_waves: dict[int, Tensor] = {}
        self._shard: Shard | None = None
        self._servers: Servers | None = None

    @property
    def shard(self) -> Shard:
        """This process' part of the parameter server."""
        assert self._shard is not None, "enter comes first"
        return self._shard

    @property
    def servers(self) -> Servers:
        """The way to all parts."""
        assert self._servers is not None, "enter comes first"
        return self._servers

    def enter(self, world: World, ranks: Sequence[int]) -> None:
        """Opens this process' server, and finds those of `ranks`, which have the same weights, in
        this order, this one included. All of a world call it together."""
        me = ranks.index(world.rank)
        all_ = stretches(self.flat.masters.numel(), len(ranks))
        self.own = all_[me]
        masters = self.flat.masters[slice(*self.own)].clone()
        last = max(0, min(self.flat.decayed, self.own.stop) - self.own.start)
        decayed = [Stretch(0, last)] if last else []
        rule = Rule(masters, decayed, self.job.optimizer, self.rate)
        self._shard = Shard(rule, len(ranks), self.bound)
        self.door = Door(self._shard)
        ports = open_doors(world, self.door)
        self._servers = Servers(me, all_, [ports[rank] for rank in ranks], {me: self._shard})

    def push(self, wave: int, facts: Tensor) -> None:
        """The gradient, of a wave from 0; facts: (FACTS,)."""
        self.servers.push(wave, 0, self.flat.gradient, facts)
        if self._anticipates:
            self._own_waves[wave] = self.flat.gradient.clone()

    def pull(self, clock: int) -> None:
        """The newest weights, once they are new enough for who has pushed `clock` waves."""
        found = self.servers.pull(clock, 0, self.flat.masters)
        self._take_up(found)
        self.facts = found[0].facts

    def settle(self, clock: int) -> None:
        """All members have come to the same step: the weights of exactly that one."""
        self._take_up(self.servers.pull(clock, 0, self.flat.masters, exact=True))

    def _take_up(self, found: Sequence[Pulled]) -> None:
        """What was pulled, and with plain SGD own waves that are not in it yet."""
        at = 0
        for pulled in found:
            size = pulled.weights.numel()
            for own, gradient in self._own_waves.items():
                if own >= pulled.version:
                    part = gradient[at : at + size]
                    self.flat.masters[at : at + size].add_(part, alpha=-self.rate(own))
            at += size
        oldest = min(pulled.version for pulled in found)
        self._own_waves = {n: g for n, g in self._own_waves.items() if n >= oldest}
        self.flat.publish()

    @property
    def moved_bytes(self) -> int:
        """That left this process: what it asked and pushed, and answered as a server."""
        return self.servers.sent_bytes + self.door.sent_bytes

    def pieces(self) -> list[Piece]:
        """Of a checkpoint, what this process is the server of; weights, too, where they are
        narrower than masters. `settle` comes first."""
        flats = {"param": self.flat.weights[slice(*self.own)]}
        if self.flat.weights is not self.flat.masters:
            flats["master"] = self.shard.rule.masters
        else:
            flats["param"] = self.shard.rule.masters
        flats |= self.shard.rule.moments
        return [piece for kind, held in flats.items() for piece in self._of_kind(kind, held)]

    def _of_kind(self, kind: str, held: Tensor) -> list[Piece]:
        found = []
        for slot in self.flat.slots:
            low, high = max(slot.start, self.own.start), min(slot.stop, self.own.stop)
            if low < high:
                data = held[low - self.own.start : high - self.own.start]
                place = (low - slot.start, high - slot.start)
                found.append(
                    Piece(f"{kind}/{slot.name}", slot.shape, dtype_name(held.dtype), *place, data)
                )
        return found

    def restore(self, found: Checkpoint) -> None:
        """Goes on from a checkpoint, whoever wrote it. ValueError when it is of another model."""
        rule = self.shard.rule
        for slot in self.flat.slots:
            values = read_checked(found, best_name(found, slot.name), slot.shape)
            self.flat.view(self.flat.masters, slot).copy_(values)
        rule.masters.copy_(self.flat.masters[slice(*self.own)])
        for kind, held in rule.moments.items():
            whole = torch.empty_like(self.flat.masters)
            for slot in self.flat.slots:
                values = read_checked(found, f"{kind}/{slot.name}", slot.shape)
                self.flat.view(whole, slot).copy_(values)
            held.copy_(whole[slice(*self.own)])
        self.flat.publish()
        self.shard.load(found.step)
