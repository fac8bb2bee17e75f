"""Cosines and sines of rotary embeddings, looked up by position: they are the same in every step.

Called by the decoder over packed weights.
"""

import numpy as np
import numpy.typing as npt

from kernels.reference.rope import Frequencies

FIRST_POSITIONS = 2048


class Angles:
    """A table of positions 0, 1, .. that grows by doubling. Thread-safe: a row never changes.

    A value is that of the float32 product of position and frequency, so it does not depend on what
    else is looked up with it.
    """

    def __init__(self, frequencies: Frequencies) -> None:
        self._inverse = frequencies.inverse.numpy()
        self._scale = np.float32(frequencies.scale)
        self._table = self._made(FIRST_POSITIONS)

    def of(
        self, positions: npt.NDArray[np.int64], end: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Cosines and sines [N, head_dim / 2] of positions [N], all below `end`."""
        cosines, sines = self._table
        if end > len(cosines):
            cosines, sines = self._table = self._made(max(end, 2 * len(cosines)))
        return cosines.take(positions, axis=0), sines.take(positions, axis=0)

    def _made(self, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        angles = np.arange(count, dtype=np.float32)[:, None] * self._inverse
        exactly = angles.astype(np.float64)
        cosines, sines = np.cos(exactly), np.sin(exactly)
        return cosines.astype(np.float32) * self._scale, sines.astype(np.float32) * self._scale
