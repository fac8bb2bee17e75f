"""What the products with quantised weights share: the choice of a way, and sizes to compile for.

Called by linear_w4.py and linear_w8.py, and by the other linears for their sample shapes.
"""

from collections.abc import Iterator

import torch

from kernels.triton.configs import Config, configs
from kernels.triton.targets import Target

WIDTH = 4096  # rows and columns of the weight in a case; its kernel takes others


def cut(op: str, target: Target, x: torch.Tensor) -> Config | None:
    """How a product with x [M, K] is cut into tiles; None above the most rows in the table.

    Float32 has a table of its own, without matrix units: its products would be spelled out, or
    rounded.
    """
    fitting = entries(op, target, x.dtype)
    if fitting[-1].rows == 0:
        return fitting[-1]
    return next((each for each in fitting if x.shape[0] <= each.rows), None)


def entries(op: str, target: Target, dtype: torch.dtype) -> list[Config]:
    """The table's entries for an op that a product in this dtype may take."""
    return list(configs(f"{op}/float32" if dtype == torch.float32 else op, target))


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's product of x [M, K] with weight [N, K], and the bias."""
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def sample(
    op: str, target: Target, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(x [M, K], out [M, N]) on the meta device, for the rows of every entry of the table."""
    for entry in entries(op, target, dtype):
        x = torch.empty(entry.rows, WIDTH, dtype=dtype, device="meta")
        yield x, x.new_empty(entry.rows, WIDTH)
