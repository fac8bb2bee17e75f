"""What ships of a kernel on one kind of GPU: a `Case`, or a `Refused` with the reason.

Every kernel module has `cases(target) -> list[Case | Refused]`, made of the constants, warps and
stages that its launcher would choose there. Read by `verify/`, which compiles each case for each
target, and by the roofline. Imports no Triton.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kernels.triton.targets import Target

Constant = int | float | bool | str | None


class Work(NamedTuple):
    """What one launch of a case moves and computes, for the roofline.

    moved_bytes: every input read once and every output written once. operations: multiplications
    and additions counted apart, on matrix units when the case has `matrix`. grid: programs.
    """

    moved_bytes: int
    operations: int
    grid: tuple[int, ...]


class Case(NamedTuple):
    """One specialisation of a kernel, compiled ahead of time and launched as it stands here.

    name: "op/variant", unique for a target, such as "w4_linear/bf16-rows16". kernel: the function
    under `@triton.jit`. signature: each run-time argument's Triton type ("*bf16", "*fp32", "i32",
    "i64", "fp32"). constants: each `tl.constexpr` argument, and None for each tensor that is left
    out. divisible: run-time arguments that are multiples of 16, pointers by their address.
    matrix: the operands for which a matrix instruction is expected, a key of `Target.matrix`
    ("half", "int8", "fp8"), or "" for none. fp_fusion: whether a product and a sum may be fused
    into one rounding; off where bits are to be those of the reference.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Constant]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    matrix: str
    work: Work
    fp_fusion: bool = True

    @property
    def op(self) -> str:
        return self.name.split("/")[0]


class Refused(NamedTuple):
    """An op that does not ship on a target, and why, as the rest of a sentence about the op."""

    op: str
    target: Target
    why: str

    def error(self) -> ValueError:
        """What a launcher raises."""
        return ValueError(f"{self.op} does not run on {self.target.name}: {self.why}.")
