"""How a launcher starts a kernel: on which target, with which options, or why it cannot.

Called by every launcher of this folder. Triton is imported inside functions, so that the table of
targets can be read without it.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from kernels.triton.targets import TARGETS, Target, cuda_target, target

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MOST_PROGRAMS = 65535  # along a grid's second and third axis, on CUDA devices
# Which target the interpreter stands for; its tests set it, nothing else reads it.
_INTERPRETED_AS: ContextVar[str] = ContextVar("interpreted_as", default="sm_80")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET was set when it was imported),
    where tensors are on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@contextmanager
def interpreted_as(name: str) -> Iterator[Target]:
    """Within it, launchers in the interpreter choose what they would on this target."""
    chosen = target(name)
    token = _INTERPRETED_AS.set(name)
    try:
        yield chosen
    finally:
        _INTERPRETED_AS.reset(token)


def target_of(op: str, tensor: torch.Tensor) -> Target:
    """The target that stands for the tensor's device.

    RuntimeError naming the op, the device and what is missing when there is no such device or no
    driver; ValueError for a GPU that is not in the catalogue.
    """
    if interpreting():
        return target(_INTERPRETED_AS.get())
    if tensor.device.type != "cuda":
        raise RuntimeError(
            f"{op} in Triton needs its tensors on a CUDA or ROCm device, not on {tensor.device}: "
            "move them there, or call the op of kernels/ops, which has an implementation for it."
        )
    return _device_target(op, tensor.device)


@functools.cache
def _device_target(op: str, device: torch.device) -> Target:
    """Looked up once: a launch of some microseconds should not ask the driver what it runs on."""
    _need_driver(op, device)
    if torch.version.hip:
        arch = str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
        known = [each for each in TARGETS if each.name == arch]
        if not known:
            names = ", ".join(each.name for each in TARGETS if each.backend == "hip")
            raise ValueError(f"{op}: {arch} is not in the catalogue; accepted are {names}.")
        return known[0]
    return cuda_target(*torch.cuda.get_device_capability(device))


def _need_driver(op: str, device: torch.device) -> None:
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except RuntimeError as missing:
        raise RuntimeError(
            f"{op} cannot be launched on {device}: Triton finds no driver ({missing}); install "
            "the driver of the GPU, and a torch built for it."
        ) from missing


def need_float(op: str, tensor: torch.Tensor) -> None:
    """ValueError unless a kernel computes with this dtype; they do not in float64."""
    if tensor.dtype not in FLOATS:
        names = ", ".join(map(str, FLOATS))
        raise ValueError(f"{op} on a GPU takes {names}, not {tensor.dtype}.")


def run(
    op: str,
    kernel: Any,
    grid: tuple[int, ...],
    args: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    fp_fusion: bool = True,
) -> None:
    """Launches kernel over the grid; without any program, it does nothing.

    args: all of the kernel's arguments by name. fp_fusion is always said, because Triton's default
    for it changes between versions.
    """
    if 0 in grid:
        return
    if any(programs > MOST_PROGRAMS for programs in grid[1:]):
        raise ValueError(
            f"{op}: a grid of {grid} has more than {MOST_PROGRAMS} programs along its second or "
            "third axis; split the call."
        )
    first = next(arg for arg in args.values() if isinstance(arg, torch.Tensor))
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion)
    if first.device.type != "cuda":
        target_of(op, first)
        kernel[grid](**args, **options)
        return
    with torch.cuda.device(first.device):
        kernel[grid](**args, **options)


class Parameter(NamedTuple):
    """One of a kernel's. special: its value at a launch may change what is compiled."""

    name: str
    constant: bool
    special: bool


def parameters(kernel: Any) -> list[Parameter]:
    """Of a function under `@triton.jit`, whether it is compiled or interpreted."""
    if hasattr(kernel, "params"):
        return [Parameter(p.name, p.is_constexpr, not p.do_not_specialize) for p in kernel.params]
    fixed = kernel.kwargs["do_not_specialize"] or ()
    given = inspect.signature(kernel.fn).parameters.values()
    return [Parameter(p.name, "constexpr" in str(p.annotation), p.name not in fixed) for p in given]
