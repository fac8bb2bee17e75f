"""A launch before it is made: so that what `cases` has compiled is what a launcher launches.

The modules of attention, experts, adapters, scan and sampling make a `Plan` of tensors, which may
be on the meta device. Launchers `run` it; `cases` turn it into a `Case` with `shipped`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from kernels.triton import launch
from kernels.triton.case import Case, Constant, Work
from kernels.triton.configs import Config

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
}
HEAD_SIZES = (64, 128, 256)  # that tiles are chosen for; others take those of the next one


Arguments = Mapping[str, torch.Tensor | Constant]


class Plan(NamedTuple):
    """kernel: the function under `@triton.jit`. args: all of its arguments by name, the tile sizes
    among them; None for a tensor that is left out."""

    kernel: Any
    grid: tuple[int, ...]
    args: Arguments
    config: Config
    fp_fusion: bool = True


def run(plan: Plan) -> None:
    """Launches the kernel, unless the grid is empty."""
    op = plan.kernel.__name__.removesuffix("_kernel")
    config = plan.config
    launch.run(
        op, plan.kernel, plan.grid, plan.args, config.num_warps, config.num_stages, plan.fp_fusion
    )


def shipped(name: str, plan: Plan, operations: int, matrix: str = "") -> Case:
    """The plan as a case. What it moves are all of its tensors, once; an integer of 1 is constant,
    as Triton makes it at a launch."""
    signature: dict[str, str] = {}
    constants: dict[str, Constant] = {}
    divisible = []
    moved_bytes = 0
    for parameter in launch.parameters(plan.kernel):
        value = plan.args[parameter.name]
        special = parameter.special
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            divisible.append(parameter.name)
            moved_bytes += value.numel() * value.element_size()
        elif parameter.constant or value is None or (special and value == 1):
            constants[parameter.name] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            assert isinstance(value, int)
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                divisible.append(parameter.name)
    work = Work(moved_bytes, operations, plan.grid)
    warps, stages = plan.config.num_warps, plan.config.num_stages
    return Case(
        name,
        plan.kernel,
        signature,
        constants,
        tuple(divisible),
        warps,
        stages,
        matrix,
        work,
        plan.fp_fusion,
    )


def precision(op: str, dtype: torch.dtype) -> str:
    """ "half" or "float32", by which tiles are chosen. ValueError for a dtype without a kernel."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    if dtype == torch.float32:
        return "float32"
    raise ValueError(
        f"{op} on a GPU computes in float16, bfloat16 or float32, not {dtype}: convert the tensors."
    )


def operands(config: Config, dtype: torch.dtype) -> str:
    """`Case.matrix` of a product of this dtype: float32 has no matrix unit that keeps its bits."""
    return "half" if config.constants.get("MATRIX") and dtype != torch.float32 else ""


def head_size(op: str, width: int) -> int:
    """The entry of `HEAD_SIZES` for heads of `width` numbers. ValueError if they are larger."""
    for size in HEAD_SIZES:
        if width <= size:
            return size
    raise ValueError(f"{op} on a GPU takes heads of up to {HEAD_SIZES[-1]} numbers, not {width}.")


def power(n: int) -> int:
    """The least power of two that is n or more, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def packed(x: torch.Tensor) -> torch.Tensor:
    """x with neighbours of the last dimension side by side, copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def flat_slots(op: str, name: str, pages: torch.Tensor, inner: int) -> torch.Tensor:
    """[pages, page_tokens, KH, ...] -> the view [slots, KH, ...].

    ValueError when slots are not evenly spaced, or a head's `inner` last dimensions have gaps: a
    copy would be the size of the cache, or lose what is written.
    """
    wanted = 1
    for dim in reversed(range(pages.dim() - inner, pages.dim())):
        if pages.stride(dim) != wanted and pages.shape[dim] != 1:
            raise ValueError(f"{op}: the numbers of a head of {name} should lie side by side.")
        wanted *= pages.shape[dim]
    even = pages.stride(0) == pages.stride(1) * pages.shape[1] or 1 in pages.shape[:2]
    if not even and pages.numel():
        raise ValueError(f"{op}: the pages of {name} should follow one another without gaps.")
    return pages.view(pages.shape[0] * pages.shape[1], *pages.shape[2:])
