"""How a worker's state is made available to others: the protocol, and plain replicas.

A worker calls `fetch` and `settle` when a generation begins and `protect` after each step; `held`
is what it tells the supervisor between generations. All but `held` are collective.
"""

import json
from dataclasses import dataclass
from typing import Protocol

import torch

from train.elastic.messages import Held, Plan, Version
from train.elastic.trainee import StepEnd, Trainee
from train.state import TrainState
from train.world import World


@dataclass(frozen=True)
class Fetched:
    """Bytes of the plan's state by where this worker has them from."""

    local_bytes: int = 0
    peer_bytes: int = 0
    store_bytes: int = 0
    lost: tuple[str, ...] = ()


class Keeper(Protocol):
    """Holds a trainee and what others need of it. A `WorldChanged` out of any method leaves `held`
    true: nothing is given up before what replaces it is complete."""

    def held(self) -> tuple[Held, ...]:
        """Every complete share in this process's memory."""
        ...

    def fetch(self, plan: Plan, world: World) -> Fetched:
        """Gets the plan's state to everybody in `plan.ranks`; world: `plan.everyone`."""
        ...

    def settle(self, world: World) -> None:
        """Loads what was fetched; world: the workers that train."""
        ...

    def step(self, world: World, stop: bool) -> StepEnd:
        """The trainee's step."""
        ...

    def protect(self, world: World) -> None:
        """Makes the finished step's state survive what it has to survive."""
        ...

    def at(self) -> int:
        """How many steps the trainee has finished."""
        ...


class Replicas:
    """Every worker holds everything: recovery copies it to whoever lacks it, and to nobody else."""

    def __init__(self, trainee: Trainee) -> None:
        self._trainee = trainee

    def held(self) -> tuple[Held, ...]:
        """The whole state after the last finished step."""
        state = self._trainee.state()
        return (Held(version=Version(step=state.step, samples=state.samples, shards=1), index=0),)

    def fetch(self, plan: Plan, world: World) -> Fetched:
        """Each worker that lacks the state gets it from another holder, in turn."""
        assert plan.version is not None and plan.version.shards == 1, "replicas are whole"
        [sources] = plan.holders
        needy = [rank for rank in range(len(plan.ranks)) if rank not in sources]
        for turn, rank in enumerate(needy):
            source = sources[turn % len(sources)]
            if world.rank == source:
                _send(world, self._trainee.state(), rank)
            elif world.rank == rank:
                state = _receive(world, self._trainee.state(), plan.version, source)
                self._trainee.load(state)
                return Fetched(peer_bytes=_bytes(state))
        mine = world.rank in sources and world.rank < len(plan.ranks)
        return Fetched(local_bytes=_bytes(self._trainee.state()) if mine else 0)

    def settle(self, world: World) -> None:
        """Loaded already."""

    def step(self, world: World, stop: bool) -> StepEnd:
        """The trainee's step."""
        return self._trainee.step(world, stop)

    def protect(self, world: World) -> None:
        """The others have it as well."""

    def at(self) -> int:
        """Finished steps."""
        return self._trainee.state().step


def _bytes(state: TrainState) -> int:
    return sum(tensor.nbytes for tensor in state.tensors.values())


def _send(world: World, state: TrainState, to: int) -> None:
    meta = torch.frombuffer(bytearray(json.dumps(state.meta).encode()), dtype=torch.uint8)
    world.send(torch.tensor([len(meta)]), to)
    world.send(meta, to)
    for name in sorted(state.tensors):
        world.send(state.tensors[name].detach().contiguous(), to)


def _receive(world: World, like: TrainState, version: Version, source: int) -> TrainState:
    """Into fresh memory: what this worker holds stays whole until all of it has come."""
    length = torch.zeros(1, dtype=torch.int64)
    world.recv(length, source)
    meta = torch.empty(int(length), dtype=torch.uint8)
    world.recv(meta, source)
    tensors = {}
    for name in sorted(like.tensors):
        shape = like.tensors[name]
        tensors[name] = torch.empty(shape.shape, dtype=shape.dtype, device=shape.device)
        world.recv(tensors[name], source)
    return TrainState(version.step, version.samples, tensors, json.loads(bytes(meta.tolist())))
