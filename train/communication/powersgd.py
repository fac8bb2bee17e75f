"""PowerSGD (Vogels et al., NeurIPS 2019): a matrix's gradient as the product of two thin ones,
found by one step of power iteration from those of the last step.

With M a rank's gradient and what it still owes: P = sum of M Q, made orthonormal; Q = sum of M' P;
the sum over ranks is then about P Q'. Vectors, and matrices that would not halve, are summed as
they are.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from train.communication.compressor import Memory, Part, pieces, seeded, uncompressed, with_error
from train.communication.transport import Transport, dense_bytes

WORTH = 2
"""A matrix is compressed if that makes it smaller by more than this factor."""


class PowerSgd:
    """rank: of the approximation. warm_start: from the last step's Q rather than a random one;
    error_feedback: what was lost is sent later; orthogonal: P is made orthonormal. All three are
    the method; without one of them it is another.
    """

    clips_locally = False

    def __init__(
        self,
        rank: int,
        warmup_steps: int,
        seed: int,
        *,
        warm_start: bool = True,
        error_feedback: bool = True,
        orthogonal: bool = True,
    ) -> None:
        self.memory = Memory()
        self.rank, self.warmup_steps, self.seed = rank, warmup_steps, seed
        self.warm_start, self.error_feedback = warm_start, error_feedback
        self.orthogonal = orthogonal

    def reduce(self, part: Part, local: Tensor, transport: Transport, step: int) -> Tensor:
        """See `Compressor`."""
        if (total := uncompressed(self, part, local, transport, step)) is not None:
            return total
        wanted = with_error(self.memory, part, local)
        total = wanted.clone()
        matrices, rest = self._sorted(part, wanted)
        places, places_of_rest = self._sorted(part, total)
        factors = self._factors(part, matrices, step)
        lefts = self._summed(
            [*(m @ q for m, q in zip(matrices, factors, strict=True)), *rest], transport
        )
        for place, value in zip(places_of_rest, lefts[len(matrices) :], strict=True):
            place.copy_(value)
        lefts = [self._base(left) for left in lefts[: len(matrices)]]
        rights = self._summed([m.T @ p for m, p in zip(matrices, lefts, strict=True)], transport)
        for number, (place, p, q) in enumerate(zip(places, lefts, rights, strict=True)):
            torch.mm(p, q.T, out=place)
            if self.warm_start:
                self.memory.stage(f"factor/{part.key}/{number}", q.flatten())
        if self.error_feedback and matrices:
            error = wanted - total / transport.size
            for piece in self._sorted(part, error)[1]:
                piece.zero_()
            self.memory.stage(f"error/{part.key}", error)
        return total

    def formula_bytes(self, part: Part, size: int, item_bytes: int) -> float:
        """rank x (n + m) values of an n x m matrix, and all of the rest."""
        values = 0
        for shape in part.shapes:
            n, m = _sides(shape)
            small = self._fits(n, m)
            values += small * (n + m) if small else n * m
        return dense_bytes(values * item_bytes, size)

    def memory_values(self, part: Part, size: int) -> int:
        """What was lost, and Q of each matrix."""
        factors = (self._fits(*_sides(shape)) * _sides(shape)[1] for shape in part.shapes)
        return part.elements + sum(factors)

    def _fits(self, rows: int, columns: int) -> int:
        """The rank that a matrix is sent at, or 0 for as it is."""
        rank = min(rows, columns, self.rank)
        return rank if (rows + columns) * rank * WORTH < rows * columns else 0

    def _sorted(self, part: Part, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views: matrices to compress, and the rest."""
        matrices, rest = [], []
        for tensor in pieces(part, flat):
            rows, columns = _sides(tuple(tensor.shape))
            if self._fits(rows, columns):
                matrices.append(tensor.view(rows, columns))
            else:
                rest.append(tensor)
        return matrices, rest

    def _factors(self, part: Part, matrices: list[Tensor], step: int) -> Iterator[Tensor]:
        """Q of each matrix, (columns, rank), orthonormal, the same on every rank."""
        for number, matrix in enumerate(matrices):
            shape = (matrix.shape[1], self._fits(*matrix.shape))
            kept = self.memory.kept.get(f"factor/{part.key}/{number}")
            if kept is None:
                chance = seeded(self.seed, part.key, number, 0 if self.warm_start else step)
                drawn = torch.randn(shape, generator=chance, dtype=torch.float64)
                kept = drawn.to(matrix.dtype)
            yield self._base(kept.view(shape))

    def _base(self, columns: Tensor) -> Tensor:
        return torch.linalg.qr(columns).Q if self.orthogonal else columns

    def _summed(self, tensors: list[Tensor], transport: Transport) -> list[Tensor]:
        """Each summed over ranks, in one call for all of them."""
        if not tensors:
            return []
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        transport.all_reduce(flat)
        ends = [0]
        for tensor in tensors:
            ends.append(ends[-1] + tensor.numel())
        cuts = zip(tensors, pairwise(ends), strict=True)
        return [flat[start:stop].view(tensor.shape) for tensor, (start, stop) in cuts]


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: its first dimension, and the others."""
    rows, columns = (shape[0], 1) if shape else (1, 1)
    for side in shape[1:]:
        columns *= side
    return rows, columns
