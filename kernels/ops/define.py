"""How an op is made known to torch: schema, implementations by device, and shapes without values.

Called by the other modules of this folder, once for each op when they are imported. The schema is
the signature of the reference; Triton is imported at the first call on a CUDA device.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch

NAMESPACE = "sanderling"

Function = TypeVar("Function", bound=Callable[..., Any])


class Out(NamedTuple):
    """What an op returns for given inputs, but for its values. Always contiguous."""

    shape: Sequence[int]
    dtype: torch.dtype


Outs = Out | tuple[Out, ...] | None
Describe = Callable[..., Outs]


def define(
    reference: Function,
    describe: Describe,
    module: str | None,
    mutates: Sequence[str] = (),
    name: str = "",
) -> Function:
    """Registers `reference` as an op and returns the op, to be called the same way.

    describe takes the same arguments, raises ValueError for those that no implementation accepts,
    and says what is returned; it reads no values. module: the one of kernels/triton whose function
    of the same name runs on a CUDA device, None where plain torch does there too. mutates: names of
    the arguments that are written to. name: of the op, if not that of the function.
    """
    name = name or reference.__name__
    made = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        _checked(name, reference, describe, lambda: reference),
        mutates_args=mutates,
        device_types="cpu",
    )
    made.register_kernel("cuda", on_cuda(name, reference, describe, module))
    made.register_fake(_empty(name, describe))
    return cast(Function, made)


def on_cuda(
    name: str, reference: Callable[..., Any], describe: Describe, module: str | None
) -> Callable[..., Any]:
    """What runs on a CUDA or ROCm device. RuntimeError when called, if anything is missing."""
    if module is None:
        return _checked(name, reference, describe, lambda: reference)
    return _checked(name, reference, describe, lambda: _launcher(name, module))


def _launcher(name: str, module: str) -> Callable[..., Any]:
    """The function that launches the kernel; what it needs is looked for only now."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"{name} on a CUDA device needs a driver, and torch finds none "
            "(torch.cuda.is_available() is false): install one, or move the tensors to the CPU."
        )
    try:
        found = importlib.import_module(f"kernels.triton.{module}")
    except ModuleNotFoundError as missing:
        raise RuntimeError(
            f"{name} on a CUDA device needs the module {missing.name}, which is not installed."
        ) from missing
    return cast(Callable[..., Any], getattr(found, name))


def _checked(
    name: str,
    reference: Callable[..., Any],
    describe: Describe,
    choose: Callable[[], Callable[..., Any]],
) -> Callable[..., Any]:
    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        _one_device(name, (*args, *kwargs.values()))
        describe(*args, **kwargs)
        return _contiguous(choose()(*args, **kwargs))

    return run


def _one_device(name: str, args: Sequence[Any]) -> torch.device:
    devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{name}: tensors should be on one device, not on {found}.")
    return devices.pop()


def _contiguous(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return made.contiguous()
    return None if made is None else tuple(each.contiguous() for each in made)


def _empty(name: str, describe: Describe) -> Callable[..., Any]:
    def fake(*args: Any, **kwargs: Any) -> Any:
        device = _one_device(name, (*args, *kwargs.values()))
        described = describe(*args, **kwargs)
        if described is None:
            return None
        if isinstance(described, Out):
            return torch.empty(described.shape, dtype=described.dtype, device=device)
        return tuple(torch.empty(o.shape, dtype=o.dtype, device=device) for o in described)

    return fake


def register_autograd(
    op: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """The gradients of an op from `define`; torch.library.register_autograd says what the two
    functions are given."""
    cast(Any, op).register_autograd(backward, setup_context=setup_context)
