"""What the matrices of a model may be stored as, by the names that `sanderling compress` takes.

A weight format turns values into blocks of a format in `kernels/formats.py`; how it chooses them is
its own affair, so a method that looks at more than one group at a time is another entry here.
"""

from typing import Any, Protocol

import gguf
import numpy as np
from numpy.typing import NDArray

from kernels.formats import FORMATS
from models.registry import lookup

WEIGHT_FORMATS = {
    "f32": "models.save.formats:F32",
    "f16": "models.save.formats:F16",
    "bf16": "models.save.formats:BF16",
    "q8_0": "models.save.formats:Q8_0",
    "q5_0": "models.save.formats:Q5_0",
    "q4_1": "models.save.formats:Q4_1",
    "q4_0": "models.save.formats:Q4_0",
}
"""Most precise first."""


class WeightFormat(Protocol):
    """One way to store a matrix."""

    form: str
    """The block format of what it makes, a name in `kernels.formats.FORMATS`."""

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Values [rows, columns] as blocks [rows, bytes]; columns is a multiple of the block's, and
        all values are finite. What does not fit the format may become infinite, never wrong."""
        ...


class Rounded:
    """Each group of values by itself: one scale from its extremes, every value to the nearest step
    (round to nearest, as ggml's reference quantisers do)."""

    def __init__(self, form: str) -> None:
        self.form = form

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """See `WeightFormat`."""
        with np.errstate(over="ignore", invalid="ignore"):
            blocks: Any = gguf.quants.quantize(values, gguf.GGMLQuantizationType[self.form])
        return np.ascontiguousarray(blocks).view(np.uint8)


F32, F16, BF16 = Rounded("F32"), Rounded("F16"), Rounded("BF16")
Q8_0, Q5_0, Q4_1, Q4_0 = Rounded("Q8_0"), Rounded("Q5_0"), Rounded("Q4_1"), Rounded("Q4_0")


def weight_format(kind: str) -> WeightFormat:
    """By its name. ValueError lists the known ones."""
    found: WeightFormat = lookup("weight format", WEIGHT_FORMATS, kind)
    return found


def fitting(columns: int) -> list[str]:
    """Names of the formats whose groups divide rows of so many values, most precise first."""
    block_values = {kind: FORMATS[weight_format(kind).form].block_values for kind in WEIGHT_FORMATS}
    return [kind for kind, values in block_values.items() if not columns % values]
