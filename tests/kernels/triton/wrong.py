"""Compiles the broken kernels for a target and prints what the gates say, as JSON.

Run in a process without the interpreter, by test_aot.py.
"""

import json
import sys

from kernels.triton.case import Case, Work
from kernels.triton.targets import target
from kernels.triton.verify.compiled import compile_case, faults
from tests.kernels.triton import broken

FLOATS = {"x": "*fp32", "out": "*fp32", "N": "i32", "x_stride": "i32", "out_stride": "i32"}
HALVES = {**FLOATS, "x": "*fp16", "out": "*fp16"}
WORK = Work(1, 0, (1,))


def case(name: str, block: int, warps: int = 4, stages: int = 1, matrix: str = "") -> Case:
    kernel = getattr(broken, name)
    signature = HALVES if name == "product" else FLOATS
    divisible = ("x", "out", "x_stride", "out_stride")
    return Case(
        f"{name}/{block}",
        kernel,
        signature,
        {"BLOCK": block},
        divisible,
        warps,
        stages,
        matrix,
        WORK,
    )


CASES = (
    case("copy_rows", 64),
    case("copy_rows", 64, matrix="half"),
    case("narrow_product", 64),
    case("narrow_product_in_a_loop", 64),
    case("narrow_page", 64),
    case("product", 64, stages=2, matrix="half"),
    case("product", 128, stages=6, warps=8, matrix="half"),
    case("spill", 8192, warps=1),
)


def main(name: str) -> None:
    """AMD's compiler takes minutes over the kernel that spills: it is left out."""
    chosen = target(name)
    for each in CASES if chosen.backend == "cuda" else CASES[:-1]:
        print(json.dumps(faults(each, chosen, compile_case(each, chosen))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
