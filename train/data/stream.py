"""The order of training samples: a function of seed and position, with no state of its own.

Sample number k of a run (counted over epochs, from 0) is always the same tokens. A run that has
consumed `samples` goes on at number `samples`, on any number of workers, and every sample of an
epoch comes exactly once.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[np.unsignedinteger[np.typing.NBitBase]]


class Share(NamedTuple):
    """A worker's samples of a step: `samples` of them from number `first` on."""

    first: int
    samples: int


def share(first: int, count: int, rank: int, size: int) -> Share:
    """What rank `rank` of `size` takes of samples first to first + count - 1: contiguous, in the
    order of ranks, none twice, none left out; shares differ by at most one."""
    start, stop = count * rank // size, count * (rank + 1) // size
    return Share(first + start, stop - start)


class SampleStream:
    """Packed sequences in an order that is shuffled anew each epoch.

    tokens: all documents, one after the other. Sample i of the corpus predicts `sequence_tokens`
    tokens, i x sequence_tokens + 1 and following; what is left over at the end is left out.
    """

    def __init__(self, tokens: Tokens, sequence_tokens: int, seed: int) -> None:
        self.tokens, self.sequence_tokens, self.seed = tokens, sequence_tokens, seed
        self.epoch_samples = (len(tokens) - 1) // sequence_tokens
        if self.epoch_samples < 1:
            raise ValueError(
                f"data: {len(tokens)} training tokens do not make one sample of "
                f"data.sequence_tokens = {sequence_tokens}."
            )
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def ids(self, first: int, count: int) -> list[int]:
        """Which samples of the corpus numbers first to first + count - 1 are."""
        return [
            int(self._epoch(number // self.epoch_samples)[number % self.epoch_samples])
            for number in range(first, first + count)
        ]

    def batch(self, first: int, count: int) -> Tensor:
        """Those samples: int64 (count, sequence_tokens + 1), each one's first token given."""
        starts = np.array(self.ids(first, count), np.int64) * self.sequence_tokens
        places = starts[:, None] + np.arange(self.sequence_tokens + 1)
        return torch.from_numpy(self.tokens[places].astype(np.int64))

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = (epoch, random.permutation(self.epoch_samples))
        return self._order[1]
