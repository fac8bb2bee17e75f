"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] scaled to unit mean square along its last dimension, times weight [n]."""
    return F.rms_norm(x, weight.shape, weight, eps)
