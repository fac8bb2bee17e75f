"""Dequantisation, bit for bit against the `gguf` library."""

import gguf
import numpy as np
import pytest
import torch

from kernels.formats import FORMATS
from kernels.reference.dequantize import PIECE_VALUES, dequantize


def stored(name: str, blocks: int) -> np.ndarray:
    """Random blocks: every byte pattern occurs, NaN and infinite scales included."""
    return np.random.default_rng(blocks).integers(
        0, 256, (blocks, FORMATS[name].block_bytes), dtype=np.uint8
    )


def decoded(name: str, raw: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(raw.shape[0] * FORMATS[name].block_values, dtype=dtype)
    return dequantize(torch.from_numpy(raw).view(-1), name, out)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("blocks", [1, 7, PIECE_VALUES // 32 + 5])
def test_bits_equal_the_gguf_library(name: str, blocks: int):
    raw = stored(name, blocks)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    wanted = np.ascontiguousarray(wanted, dtype=np.float32).reshape(-1)
    ours = decoded(name, raw).numpy()
    # A NaN is a NaN: its payload is not part of the format.
    real = ~np.isnan(wanted)
    assert real.any()
    assert np.array_equal(np.isnan(ours), ~real)
    assert np.array_equal(ours[real].view(np.int32), wanted[real].view(np.int32))


def test_sizes_are_those_of_the_gguf_library():
    for name, form in FORMATS.items():
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (form.block_values, form.block_bytes) == sizes


def test_a_half_precision_destination_is_rounded_once():
    raw = stored("Q4_1", 64)
    raw[:, 1] = raw[:, 3] = 0x30  # ordinary scales
    exact = decoded("Q4_1", raw)
    assert torch.equal(decoded("Q4_1", raw, torch.bfloat16), exact.bfloat16())


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="Q5_9.*Q4_K"):
        dequantize(torch.zeros(20, dtype=torch.uint8), "Q5_9", torch.empty(32))
