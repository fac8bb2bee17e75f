"""Random matrices in GGUF's block formats, as kernels are tested with them."""

import gguf
import numpy as np
import torch

# What a half is multiplied by to give values of a standard deviation of one, roughly: the library
# cannot quantise K-quants itself, so their integers are drawn.
K_SPREAD = {"Q4_K": 330.0, "Q5_K": 660.0, "Q6_K": 1370.0}


def random_blocks(form: str, rows: int, columns: int, seed: int = 0, scale: float = 1.0):
    """[rows, bytes] uint8 of random values, `scale` their standard deviation. NumPy."""
    chance = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[form]
    if form not in K_SPREAD:
        values = chance.standard_normal((rows, columns), dtype=np.float32)
        return gguf.quants.quantize(values * np.float32(scale), kind)
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = chance.integers(0, 256, (rows * columns // 256, block_bytes), dtype=np.uint8)
    outer = chance.uniform(0.5, 1.5, len(blocks)) * scale / K_SPREAD[form]
    outer *= chance.choice([1, 1, 1, -1], len(blocks))
    if form != "Q6_K":
        blocks[:, 0:4] = _halves(outer, (7.5 if form == "Q4_K" else 15.5) * outer)
    else:
        blocks[:, 208:210] = _halves(outer)
    return blocks.reshape(rows, -1)


def _halves(*columns: np.ndarray) -> np.ndarray:
    return np.stack(columns, axis=1).astype(np.float16).view(np.uint8)


def flat(blocks: np.ndarray) -> torch.Tensor:
    """As ops.pack takes them."""
    return torch.from_numpy(np.ascontiguousarray(blocks)).flatten()
