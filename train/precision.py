"""What numbers are kept in: the dtype of weights and activations, and that of masters."""

import torch

COMPUTE = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """Of what the optimizer updates, of its moments and of summed gradients."""
    return torch.float32 if compute == torch.bfloat16 else compute
