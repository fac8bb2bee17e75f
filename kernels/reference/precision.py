"""The dtype that references compute in: never less than float32, float64 where it is given.

Half inputs would otherwise be rounded at every step, and an oracle must not. gradcheck needs the
float64. Called by the other modules of this folder.
"""

import torch


def wide(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 when any of the tensors is, else float32."""
    given = (tensor.dtype for tensor in tensors if tensor is not None)
    return torch.float64 if torch.float64 in given else torch.float32
