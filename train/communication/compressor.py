"""What every gradient compressor is: the part of a gradient that it sends at once, what it
remembers of it, and the one operation, a sum over ranks.

Sums, not means: a worker's share of a batch may be larger than another's, and the loss is divided
by the batch's tokens beforehand. What one step leaves out is remembered by the rank that left it
out, so the sum over ranks of memories is the gradient that is still to come.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from train.communication.transport import Transport

Owned = dict[str, Tensor]
"""A rank's memory: "<kind>/<part>" and further words, to a flat tensor."""
SHARED = ("factor",)
"""Kinds of memory that are the same on every rank, and have to be."""
SERVER = "server"
"""Kind that belongs to a rank's share of a part: it is void when ranks change."""


@dataclass(frozen=True)
class Part:
    """A stretch of the gradient that is sent at once: tensors of these shapes, flattened."""

    key: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and one past the last element of each tensor."""
        ends = list(accumulate(prod(shape) for shape in self.shapes))
        return list(zip([0, *ends], ends, strict=False))

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(prod(shape) for shape in self.shapes)


class Memory:
    """What a rank remembers between steps. A step stages new values; they count only once it is
    whole, so that a step which is abandoned leaves the memory of the last finished one."""

    def __init__(self) -> None:
        self.kept: Owned = {}
        self._staged: Owned = {}

    def stage(self, name: str, value: Tensor) -> None:
        """A new value, from `commit` on."""
        self._staged[name] = value

    def commit(self) -> None:
        """The step is whole."""
        self.kept |= self._staged
        self._staged = {}

    def abandon(self) -> None:
        """It was not."""
        self._staged = {}

    def forget_shared(self) -> None:
        """Drops what ranks have to agree on, which a newcomer does not have."""
        kinds = (*SHARED, SERVER)
        self.kept = {n: t for n, t in self.kept.items() if n.partition("/")[0] not in kinds}


class Compressor(Protocol):
    """One rank's; every rank calls it with the same parts in the same order."""

    memory: Memory
    warmup_steps: int
    clips_locally: bool
    """Whether the gradient has to be clipped before it, since what comes out is no gradient."""

    def reduce(self, part: Part, local: Tensor, transport: Transport, step: int) -> Tensor:
        """About the sum over ranks of `local`, the same bits on every rank; a new tensor.

        local: (part.elements,), left as it is; step: from 1. Memory is staged."""
        ...

    def formula_bytes(self, part: Part, size: int, item_bytes: int) -> float:
        """What a rank of `size` sends for a part in a step after the warm-up, by the formula;
        item_bytes: of an uncompressed value."""
        ...

    def memory_values(self, part: Part, size: int) -> int:
        """How many values a rank remembers of a part."""
        ...


def uncompressed(
    compressor: Compressor, part: Part, local: Tensor, transport: Transport, step: int
) -> Tensor | None:
    """The sum as it is, where nothing is compressed: in the warm-up, and in a world of one; None
    elsewhere."""
    if step <= compressor.warmup_steps:
        total = local.clone()
        transport.all_reduce(total)
        return total
    return alone(compressor.memory, part, local) if transport.size == 1 else None


def with_error(memory: Memory, part: Part, local: Tensor) -> Tensor:
    """What is to be sent: the new and what was left out before; a new tensor."""
    error = memory.kept.get(f"error/{part.key}")
    return local.clone() if error is None else local + error


def alone(memory: Memory, part: Part, local: Tensor) -> Tensor:
    """What a world of one makes of a gradient: nothing is lost, and what was lost before comes."""
    total = with_error(memory, part, local)
    if f"error/{part.key}" in memory.kept:
        memory.stage(f"error/{part.key}", torch.zeros_like(local))
    return total


def regrouped(ranks: Mapping[int, Owned], rank: int, size: int) -> Owned:
    """The memory of `rank` of `size` from that of all ranks of a checkpoint: its own to the bit
    where there are as many; else an equal part of what all of them still had to send."""
    if not ranks or set(ranks) == set(range(size)):
        return dict(ranks.get(rank, {}))
    everybody = [ranks[old] for old in sorted(ranks)]
    merged: Owned = {}
    for name, mine in everybody[0].items():
        kind, _, rest = name.partition("/")
        if kind in SHARED:
            merged[name] = mine.clone()
        elif kind != SERVER:
            total = torch.stack([owned[name] for owned in everybody]).sum(0)
            server = f"{SERVER}/{rest}"
            served = [owned[server] for owned in everybody if server in owned]
            if served and kind == "error":
                total += torch.cat(served)[: total.numel()]
            merged[name] = total / size
    return merged


def seeded(*words: object) -> torch.Generator:
    """A generator whose numbers are a function of the words."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def pieces(part: Part, flat: Tensor) -> Iterable[Tensor]:
    """The tensors of a part, in their shapes, as views."""
    for (start, stop), shape in zip(part.spans, part.shapes, strict=True):
        yield flat[start:stop].view(shape)


def added(payloads: Sequence[Tensor], decode: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of what payloads say, in the order of ranks."""
    total = decode(payloads[0])
    for payload in payloads[1:]:
        total += decode(payload)
    return total
