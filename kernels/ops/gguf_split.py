"""`dequantize_blocks`, and `from_gguf`, which is no op: it runs once, where weights are loaded."""

import torch

from kernels.formats import FORMATS
from kernels.ops import checks
from kernels.ops.define import Out, define
from kernels.reference import gguf_split as reference
from kernels.reference.gguf_split import SplitWeight, from_gguf

__all__ = ["SplitWeight", "dequantize_blocks", "from_gguf"]


def _blocks(stored: torch.Tensor, form: str, dtype: torch.dtype) -> Out:
    checks.need(
        form in FORMATS,
        f"block format {form!r} is not known; accepted are {', '.join(FORMATS)}.",
    )
    block = FORMATS[form]
    checks.dtype("dequantize_blocks: stored", stored, (torch.uint8,))
    checks.need(
        stored.dim() == 1 and stored.shape[0] % block.block_bytes == 0,
        f"dequantize_blocks: blocks of {form} are a multiple of {block.block_bytes} bytes in one "
        f"dimension, not {list(stored.shape)}.",
    )
    checks.out_dtype("dequantize_blocks", dtype)
    return Out((stored.shape[0] // block.block_bytes * block.block_values,), dtype)


dequantize_blocks = define(reference.dequantize_blocks, _blocks, "gguf_split")
