"""Gemini's live part: after every step each worker's share goes into m - 1 peers' memory.

A version is given up only when a later one is known to be complete on all workers: that somebody's
collective of the next step ended says that everybody has come so far. So a step torn by a kill
leaves the version before it whole. Recovery takes a share from this process's memory, else from a
peer's, else from the store, and counts the bytes of each. Placement: train/resilience/gemini.py.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from train.data.stream import share
from train.elastic.keeper import Fetched
from train.elastic.messages import Held, Plan, Version
from train.elastic.trainee import Flat, ShardedTrainee, StepEnd
from train.resilience.gemini import holders
from train.state import TrainState
from train.world import World


class ShardStore(Protocol):
    """Durable state, for when no memory has it. Every worker sees the same one."""

    def newest(self) -> Version | None:
        """The newest whole version, or None."""
        ...

    def read(self, version: Version, name: str, first: int, count: int) -> Tensor:
        """Part of a vector, flat."""
        ...

    def write(self, version: Version, world: World, state: TrainState) -> None:
        """Every rank's share of it, whole once all have returned. Collective."""
        ...


class Part(NamedTuple):
    """Elements of vector `name` from `first` on: of the old `share`, needed by the new `rank`."""

    rank: int
    share: int
    name: str
    first: int
    elements: int


@dataclass
class Traffic:
    """Bytes that this worker has sent to peers: its copies after steps, and shares handed on."""

    copied_bytes: int = 0
    copies: int = 0
    handed_bytes: int = 0


class PeerMemory:
    """A sharded trainee and the shares in this process: its own, and those it keeps for others.

    copies: m, the owner's included (as many as there are workers, where they are fewer).
    store: asked when a share is in no memory. store_every: steps between durable versions, 0: none.
    """

    def __init__(
        self,
        trainee: ShardedTrainee,
        copies: int,
        store: ShardStore | None = None,
        store_every: int = 0,
    ) -> None:
        self._trainee, self._copies = trainee, copies
        self._store, self._store_every = store, store_every
        self._memory: dict[tuple[Version, int], dict[str, Tensor]] = {}
        self._fetched: TrainState | None = None
        self._stepped = 0
        self.traffic = Traffic()

    def held(self) -> tuple[Held, ...]:
        """Every complete share in memory."""
        return tuple(Held(version=version, index=index) for version, index in self._memory)

    def at(self) -> int:
        """Finished steps."""
        return self._stepped

    def step(self, world: World, stop: bool) -> StepEnd:
        """The trainee's step."""
        return self._trainee.step(world, stop)

    def fetch(self, plan: Plan, world: World) -> Fetched:
        """This rank's share under the new plan, from what is nearest."""
        self._fetched = None
        # What is newer than the plan's version is not whole, and its steps will be made again.
        newest = plan.version.step if plan.version else -1
        self._memory = {k: v for k, v in self._memory.items() if k[0].step <= newest}
        if plan.version is None:
            return self._from_store(plan, world)
        needed = parts(self._trainee.flats(), plan.version.shards, len(plan.ranks))
        tensors = self._empty(world.rank, len(plan.ranks))
        local = peer = 0
        load = [0] * world.size
        for part in needed:
            sources = plan.holders[part.share]
            source = part.rank if part.rank in sources else min(sources, key=lambda s: load[s])
            nbytes = part.elements * self._trainee.flats()[part.name].dtype.itemsize
            if source != part.rank:
                load[source] += nbytes
            if world.rank == source == part.rank:
                self._into(tensors, part, self._kept(plan.version, part), len(plan.ranks))
                local += nbytes
            elif world.rank == source:
                world.send(self._kept(plan.version, part), part.rank)
                self.traffic.handed_bytes += nbytes
            elif world.rank == part.rank:
                received = torch.empty(part.elements, dtype=tensors[part.name].dtype)
                world.recv(received, source)
                self._into(tensors, part, received, len(plan.ranks))
                peer += nbytes
        self._fetched = TrainState(plan.version.step, plan.version.samples, tensors)
        return Fetched(local, peer, 0, plan.lost)

    def settle(self, world: World) -> None:
        """Loads the share, and has it protected again before the first step."""
        self._trainee.load_shard(world, self._fetched)
        self._fetched = None
        self._copy(world)

    def protect(self, world: World) -> None:
        """The finished step's shares into peers' memory, and now and then into the store."""
        # Everybody has ended a step together, so everybody had all copies of the one before.
        kept = max((v.step for v, _ in self._memory), default=-1)
        self._memory = {k: v for k, v in self._memory.items() if k[0].step == kept}
        self._copy(world)
        if self._store and self._store_every and self._stepped % self._store_every == 0:
            state = self._trainee.shard()
            version = Version(step=state.step, samples=state.samples, shards=world.size)
            self._store.write(version, world, state)

    def _copy(self, world: World) -> None:
        """Own share into own memory and the peers'; each worker goes through all pairs in one
        order, so that no two wait for each other."""
        state = self._trainee.shard()
        version = Version(step=state.step, samples=state.samples, shards=world.size)
        own = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
        self._memory[version, world.rank] = own
        for owner, (_, *others) in enumerate(holders(world.size, min(self._copies, world.size))):
            for holder in others:
                if world.rank == owner:
                    for name in _filled(own):
                        world.send(own[name], holder)
                        self.traffic.copied_bytes += own[name].nbytes
                elif world.rank == holder:
                    received = self._empty(owner, world.size)
                    for name in _filled(received):
                        world.recv(received[name], owner)
                    self._memory[version, owner] = received
        self.traffic.copies += 1
        self._stepped = state.step

    def _empty(self, rank: int, size: int) -> dict[str, Tensor]:
        """Memory for one rank's share; nothing for a rank beyond `size`, which only gives."""
        if rank >= size:
            return {}
        return {
            name: torch.empty(share(0, flat.length, rank, size).samples, dtype=flat.dtype)
            for name, flat in self._trainee.flats().items()
        }

    def _kept(self, version: Version, part: Part) -> Tensor:
        kept = self._memory[version, part.share][part.name]
        length = self._trainee.flats()[part.name].length
        start = part.first - share(0, length, part.share, version.shards).first
        return kept[start : start + part.elements].contiguous()

    def _into(self, tensors: dict[str, Tensor], part: Part, data: Tensor, size: int) -> None:
        length = self._trainee.flats()[part.name].length
        start = part.first - share(0, length, part.rank, size).first
        tensors[part.name][start : start + part.elements] = data

    def _from_store(self, plan: Plan, world: World) -> Fetched:
        """Nobody has it: the store's newest version, which rank 0 names; else a fresh start."""
        found = torch.full((3,), -1, dtype=torch.int64)
        newest = self._store.newest() if self._store and world.rank == 0 else None
        if newest:
            found = torch.tensor([newest.step, newest.samples, newest.shards])
        world.broadcast(found, 0)
        if found[0] < 0:
            return Fetched(lost=(*plan.lost, "and no store has any: from the first step on"))
        assert self._store is not None, "every worker has the store that rank 0 has"
        step, samples, shards = (int(value) for value in found)
        version = Version(step=step, samples=samples, shards=shards)
        tensors = {}
        for name, flat in self._trainee.flats().items():
            mine = share(0, flat.length, world.rank, len(plan.ranks))
            tensors[name] = self._store.read(version, name, mine.first, mine.samples)
        self._fetched = TrainState(version.step, version.samples, tensors)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return Fetched(0, 0, nbytes, plan.lost)


def _filled(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold anything (a vector may be shorter than there are ranks)."""
    return [name for name in sorted(tensors) if tensors[name].numel()]


def parts(flats: dict[str, Flat], old: int, new: int) -> list[Part]:
    """Every piece of an old share (of `old`) that a rank of `new` needs, in one order for all."""
    found = []
    for name, flat in sorted(flats.items()):
        for rank in range(new):
            mine = share(0, flat.length, rank, new)
            for index in range(old):
                theirs = share(0, flat.length, index, old)
                first = max(mine.first, theirs.first)
                count = min(mine.first + mine.samples, theirs.first + theirs.samples) - first
                if count > 0:
                    found.append(Part(rank, index, name, first, count))
    return found
