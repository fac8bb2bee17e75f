"""QSGD (Alistarh et al., NeurIPS 2017): values of a stretch as whole parts of its norm, rounded up
or down at random so that their expectation is the value itself; coded, sent to all, decoded, added.

Unbiased, so nothing has to be remembered. Chance is a function of seed, step, rank and part.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.communication import elias
from train.communication.compressor import Memory, Part, added, seeded, uncompressed
from train.communication.transport import Transport

STRETCH = 512
"""Values with a norm of their own, as in the paper's experiments."""
CODES = (elias.GAMMA, elias.SPARSE, elias.UNARY)
PACKED = len(CODES)
"""First byte of a payload: how its numbers are written, by a code or all in as many bits; whichever
takes least."""
SAMPLE = 1 << 16


class Qsgd:
    """bits: a value takes at most, its sign included; 2^(bits - 1) - 1 parts of the norm."""

    clips_locally = False

    def __init__(self, bits: int, warmup_steps: int, seed: int) -> None:
        self.memory = Memory()
        self.bits, self.warmup_steps, self.seed = bits, warmup_steps, seed

    @property
    def levels(self) -> int:
        """Into how many parts a norm is divided."""
        return (1 << (self.bits - 1)) - 1

    def reduce(self, part: Part, local: Tensor, transport: Transport, step: int) -> Tensor:
        """See `Compressor`."""
        if (total := uncompressed(self, part, local, transport, step)) is not None:
            return total
        chance = seeded(self.seed, step, transport.rank, part.key)
        payload = encode(*quantise(local, self.levels, chance), self.bits)
        lengths = transport.all_gather(torch.tensor([len(payload)]))
        room = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
        room[: len(payload)] = torch.from_numpy(payload)
        rows = transport.all_gather(room)

        def value(row: Tensor) -> Tensor:
            numbers, norms = decode(row.numpy(), part.elements, self.bits)
            return dequantise(numbers, norms, self.levels, local.dtype)

        return added(rows, value)

    def formula_bytes(self, part: Part, size: int, item_bytes: int) -> float:
        """To every other rank the code's length for normally distributed values, which has no
        closed form and is taken from a sample; codes are as long as gradients are spread."""
        count = min(SAMPLE, part.elements)
        values = torch.randn(count, generator=seeded("normal"))
        payload = encode(*quantise(values, self.levels, seeded("rounding")), self.bits)
        return (size - 1) * len(payload) * part.elements / count

    def memory_values(self, part: Part, size: int) -> int:
        """None."""
        return 0


Numbers = NDArray[np.int32]
Norms = NDArray[np.float32]


def quantise(values: Tensor, levels: int, chance: torch.Generator) -> tuple[Numbers, Norms]:
    """values: (n,); numbers from -levels to levels, and the 2-norm of each STRETCH of values."""
    filled = torch.zeros(-(-values.numel() // STRETCH) * STRETCH, dtype=torch.float64)
    filled[: values.numel()] = values
    rows = filled.view(-1, STRETCH)
    norms = rows.norm(dim=1).numpy().astype(np.float32)
    # Rounded to nearest it may be less than the largest value, which had no number then.
    norms = np.where(norms > 0, np.nextafter(norms, np.float32(np.inf)), norms)
    scale = torch.from_numpy(np.where(norms > 0, norms, 1)).double()[:, None]
    exact = rows.abs() / scale * levels
    drawn = torch.rand(rows.shape, generator=chance, dtype=torch.float64)
    numbers = (exact + drawn).floor() * rows.sign()
    numbers = numbers.nan_to_num_(0, 0, 0)  # a norm that is no number makes values that are none
    return numbers.flatten()[: values.numel()].numpy().astype(np.int32), norms


def dequantise(numbers: Numbers, norms: Norms, levels: int, dtype: torch.dtype) -> Tensor:
    """The values that numbers stand for."""
    each = np.repeat(norms.astype(np.float64) / levels, STRETCH)[: len(numbers)]
    return torch.from_numpy(numbers * each).to(dtype)


def encode(numbers: Numbers, norms: Norms, bits: int) -> elias.Bytes:
    """How the numbers are written, norms, numbers; bytes."""
    head = norms.astype("<f4").view(np.uint8)
    lengths = [code.bits_of(numbers) for code in CODES] + [bits * len(numbers)]
    how = lengths.index(min(lengths))
    body = _packed(numbers, bits) if how == PACKED else CODES[how].encode(numbers)
    return np.concatenate([np.array([how], dtype=np.uint8), head, body])


def decode(payload: elias.Bytes, count: int, bits: int) -> tuple[Numbers, Norms]:
    """What was encoded; bytes after it are ignored."""
    border = 1 + 4 * math.ceil(count / STRETCH)
    norms = payload[1:border].copy().view("<f4").astype(np.float32)
    body = payload[border:].copy()
    how = int(payload[0])
    numbers = _unpacked(body, count, bits) if how == PACKED else CODES[how].decode(body, count)
    return numbers, norms


def _packed(numbers: Numbers, bits: int) -> elias.Bytes:
    """The lowest `bits` of each number's two's complement."""
    planes = (numbers[:, None] >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8))


def _unpacked(body: elias.Bytes, count: int, bits: int) -> Numbers:
    planes = np.unpackbits(body, count=count * bits).reshape(count, bits).astype(np.int32)
    values = (planes << np.arange(bits, dtype=np.int32)).sum(1, dtype=np.int32)
    signed: Numbers = np.where(values >= 1 << (bits - 1), values - (1 << bits), values)
    return signed
