"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] scaled to unit mean square along its last dimension, times weight [n]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [..., n] -> (rms_norm(x + residual), x + residual).

    The sum is rounded to x's dtype first, and that is what is normalised: so a decoder gives the
    same bits with the two in one kernel or apart.
    """
    added = x + residual
    return rms_norm(added, weight, eps), added
