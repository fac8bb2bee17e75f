"""Which functions a decoder on a device is made of.

On a CUDA or ROCm device they are the launchers of kernels/triton themselves: the dispatcher in
front of them costs a step of 300 launches some milliseconds, and a decoder's arguments were checked
when it was built. Elsewhere they are the ops of kernels/ops, which a CPU computes in plain torch.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

OneOut = Callable[..., torch.Tensor]


class Ops(NamedTuple):
    """By the names and with the arguments of kernels/reference."""

    rms_norm: OneOut
    rms_norm_residual: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rope: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    kv_write: Callable[..., None]
    paged_attention: OneOut
    prefill_attention: OneOut
    gated: OneOut
    w4_linear: OneOut
    dequantize_w4: OneOut
    w8_linear: OneOut
    dequantize_w8: OneOut


MODULES = {
    "rms_norm": "norm",
    "rms_norm_residual": "norm",
    "rope": "rope",
    "kv_write": "kv_cache",
    "paged_attention": "attention_paged",
    "prefill_attention": "attention_prefill",
    "gated": "gated",
    "w4_linear": "linear_w4",
    "dequantize_w4": "linear_w4",
    "w8_linear": "linear_w8",
    "dequantize_w8": "linear_w8",
}


def ops_of(package: str) -> Ops:
    """package: kernels.ops, kernels.reference or kernels.triton."""
    return Ops(
        **{
            name: getattr(importlib.import_module(f"{package}.{module}"), name)
            for name, module in MODULES.items()
        }
    )


def ops_for(device: torch.device) -> Ops:
    """The fastest there are for a device."""
    return ops_of("kernels.triton" if device.type == "cuda" else "kernels.ops")
