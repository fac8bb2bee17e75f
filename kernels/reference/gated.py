"""Gated activations of feed-forwards (Shazeer, 2020), the two halves in one matrix.

`reference/swiglu.py` is the same for the CPU decoder, whose bits are fixed.
"""

import torch
import torch.nn.functional as F

from kernels.reference.precision import wide

ACTIVATIONS = ("silu", "gelu_tanh")


def gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """x [T, 2F], gate first, then up -> activation(gate) * up, [T, F].

    activation: "silu" (SwiGLU) or "gelu_tanh" (GEGLU in its tanh form). ValueError for another.
    """
    gate, up = x.to(wide(x)).chunk(2, dim=-1)
    if activation == "silu":
        return (F.silu(gate) * up).to(x.dtype)
    if activation == "gelu_tanh":
        return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)
    known = ", ".join(ACTIVATIONS)
    raise ValueError(f"activation {activation!r} is not known; accepted are {known}.")
