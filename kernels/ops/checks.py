"""The sentences that say what is wrong with an op's arguments; all raise ValueError.

Called by the modules of this folder with shapes only, so that tracing runs them too.
"""

from collections.abc import Sequence

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALES = (torch.float16, torch.float32)
INTEGERS = (torch.int32, torch.int64)


def need(holds: bool, sentence: str) -> None:
    """ValueError with the sentence unless it holds."""
    if not holds:
        raise ValueError(sentence)


def dims(what: str, tensor: torch.Tensor, layout: str) -> None:
    """layout: the names of the dimensions, as in "[T, H, D]"."""
    count = layout.count(",") + 1
    if tensor.dim() != count:
        raise ValueError(f"{what} should be {layout}, not {list(tensor.shape)}.")


def shape(what: str, tensor: torch.Tensor, *wanted: int) -> None:
    """The tensor has exactly this shape."""
    if len(wanted) != tensor.dim() or any(
        have != want for have, want in zip(tensor.shape, wanted, strict=True)
    ):
        raise ValueError(f"{what} should be {list(wanted)}, not {list(tensor.shape)}.")


def dtype(what: str, tensor: torch.Tensor, accepted: Sequence[torch.dtype]) -> None:
    """The tensor's dtype is one of those accepted."""
    if tensor.dtype not in accepted:
        names = ", ".join(map(str, accepted))
        raise ValueError(f"{what} is {tensor.dtype}; accepted are {names}.")


def out_dtype(what: str, given: torch.dtype) -> None:
    """A result of this dtype can be asked for."""
    if given not in FLOATS:
        names = ", ".join(map(str, FLOATS))
        raise ValueError(f"{what} is asked to return {given}; accepted are {names}.")


def bias(op: str, given: torch.Tensor | None, columns: int) -> None:
    """None, or [N] floats."""
    if given is not None:
        shape(f"{op}: bias", given, columns)
        dtype(f"{op}: bias", given, FLOATS)


def heads(op: str, q: torch.Tensor, kv_heads: int) -> None:
    """Query heads are a multiple of the key heads."""
    need(
        kv_heads > 0 and q.shape[1] % kv_heads == 0,
        f"{op}: {q.shape[1]} query heads should be a multiple of {kv_heads} key heads.",
    )
