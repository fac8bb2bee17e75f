"""Writes a GGUF file: matrices in one weight format, everything else as it was.

One tensor at a time is in memory. The file appears whole or not at all.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from kernels.formats import FORMATS
from kernels.reference.dequantize import dequantize
from models.save.formats import WeightFormat, fitting
from models.save.source import Source, Tensor

QUANTIZATION_VERSION = 2
"""Of ggml's block formats as they are now."""


class Written(NamedTuple):
    """What became of a model. error: the matrices' difference to what they were, over their own
    size (root of summed squares); 0 where nothing was rounded."""

    path: Path
    bytes: int
    error: float


class Encoded(NamedTuple):
    """A tensor's blocks, and the squares of its error and of its values, summed."""

    blocks: NDArray[np.uint8]
    error: float = 0.0
    size: float = 0.0


def write_gguf(
    source: Source,
    path: Path,
    chosen: WeightFormat,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Written:
    """Writes the model to a new file. watch: told after each tensor how many of all are written.

    A matrix that is in the chosen format already is copied. ValueError when the file exists, groups
    do not divide rows, or a value is not finite or too large for the format.
    """
    refuse(source, path, chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(part, source.architecture)
    try:
        _head(writer, source, chosen)
        error = size = 0.0
        for number, tensor in enumerate(source.tensors, start=1):
            made = _encoded(source, tensor, chosen)
            writer.write_tensor_data(made.blocks)
            error, size = error + made.error, size + made.size
            watch(number, len(source.tensors))
        writer.close()
        part.replace(path)
    finally:
        writer.close()
        part.unlink(missing_ok=True)
    return Written(path, path.stat().st_size, math.sqrt(error / size) if size else 0.0)


def refuse(source: Source, path: Path, chosen: WeightFormat) -> None:
    """ValueError where the file exists, or a group of the format does not divide some rows."""
    if path.exists():
        raise ValueError(f"{path} exists: give another --out, or delete it.")
    group = FORMATS[chosen.form].block_values
    for tensor in source.tensors:
        if _is_matrix(tensor) and tensor.shape[-1] % group:
            accepted = ", ".join(fitting(math.gcd(*(t.shape[-1] for t in _matrices(source)))))
            raise ValueError(
                f"{source.name}: {tensor.name} has rows of {tensor.shape[-1]} values, and "
                f"{chosen.form} stores groups of {group}, which must divide them; accepted for "
                f"this model are {accepted}."
            )


def _matrices(source: Source) -> list[Tensor]:
    return [tensor for tensor in source.tensors if _is_matrix(tensor)]


def _is_matrix(tensor: Tensor) -> bool:
    """Norms, biases and factors of a rotation are few, and stay as they are."""
    return len(tensor.shape) == 2


def _head(writer: "gguf.GGUFWriter", source: Source, chosen: WeightFormat) -> None:
    """Everything before the tensors' data."""
    for entry in source.metadata:
        writer.add_key_value(entry.key, entry.value, entry.kind, entry.of)
    name = "ALL_F32" if chosen.form == "F32" else f"MOSTLY_{chosen.form}"
    writer.add_file_type(int(gguf.LlamaFileType[name]))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for tensor in source.tensors:
        form = FORMATS[chosen.form if _is_matrix(tensor) else tensor.form]
        count = math.prod(tensor.shape) // form.block_values * form.block_bytes
        kind = gguf.GGMLQuantizationType[form.name]
        plain = np.dtype(np.float32)  # whose shape the library takes for that of the values
        writer.add_tensor_info(tensor.name, tensor.shape, plain, count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _encoded(source: Source, tensor: Tensor, chosen: WeightFormat) -> Encoded:
    if not _is_matrix(tensor) or tensor.form == chosen.form:
        return Encoded(source.stored(tensor))
    values = source.values(tensor)
    if not np.isfinite(values).all():
        raise ValueError(f"{source.name}: {tensor.name} has values that are not finite.")
    blocks = chosen.encode(values)
    back = torch.empty(values.size, dtype=torch.float32)
    dequantize(torch.from_numpy(blocks.reshape(-1)), chosen.form, back)
    lost = back.numpy() - values.reshape(-1)
    if not np.isfinite(lost).all():
        raise ValueError(
            f"{source.name}: {tensor.name} has values up to {np.abs(values).max():.3g}, too large "
            f"for {chosen.form}; f32 and bf16 are accepted."
        )
    return Encoded(blocks, _squares(lost), _squares(values))


def _squares(values: NDArray[np.float32]) -> float:
    return float(np.square(values, dtype=np.float64).sum())
