"""Layer A: Triton's interpreter, made to round bfloat16 and float8 as GPUs do.

The interpreter computes with numpy, which has neither type. As it comes, it multiplies the raw
bits of bfloat16, cuts off instead of rounding, and loses carries into float8's exponent. Here such
numbers are float32 while they are computed with, and torch rounds them. Products of float8 and of
int8 are summed exactly; float32 products are those of `input_precision="ieee"`, and others are
rounded to TF32 first, as a GPU would. Called by tests/conftest.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


class Floats:
    """Conversions between the interpreter's arrays of bits and torch's floats."""

    def __init__(self, language: Any) -> None:
        self.dtypes = {
            language.bfloat16: torch.bfloat16,
            language.float16: torch.float16,
            language.float32: torch.float32,
            language.float64: torch.float64,
            language.float8e4nv: torch.float8_e4m3fn,
            language.float8e5: torch.float8_e5m2,
            language.float8e4b8: torch.float8_e4m3fnuz,
            language.float8e5b16: torch.float8_e5m2fnuz,
        }

    def convert(self, data: Any, source: Any, wanted: Any) -> Any:
        """data, numbers of Triton's type `source` -> the bits of those of type `wanted`, an
        unsigned array of the same shape; rounded half to even. What is too large for e4m3fn
        becomes its largest number, in torch as on GPUs."""
        bits = np.ascontiguousarray(data)
        plain = bits.view(f"i{bits.dtype.itemsize}" if bits.dtype.itemsize > 1 else "u1").copy()
        given = torch.from_numpy(plain).view(self.dtypes[source])
        kind = self.dtypes[wanted]
        made = given.to(kind).contiguous()
        size = made.element_size()
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        return made.view(whole).numpy().view(f"u{size}").reshape(np.shape(data))


@contextmanager
def repaired() -> Iterator[None]:
    """Within it, the interpreter is repaired. RuntimeError unless Triton interprets kernels."""
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton's interpreter is repaired where TRITON_INTERPRET=1 was set before Triton was "
            "imported; here it was not."
        )
    from triton.runtime import interpreter

    changes = _changes(interpreter)
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, made in changes:
        setattr(owner, name, made)
    try:
        yield
    finally:
        for owner, name, was in kept:
            setattr(owner, name, was)


Change = tuple[Any, str, Callable[..., Any]]


def _changes(interpreter: Any) -> list[Change]:
    builder, handle, tl = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.tl
    floats = Floats(tl)

    def wide(arg: Any) -> Any:
        if arg.dtype.scalar != tl.bfloat16:
            return arg
        bits = floats.convert(arg.data, tl.bfloat16, tl.float32)
        return handle(bits.view(np.float32), tl.float32)

    def narrow(data: Any) -> Any:
        exact = np.asarray(data, np.float32)
        return handle(floats.convert(exact, tl.float32, tl.bfloat16), tl.bfloat16)

    return [
        (interpreter, "_convert_float", _convert(interpreter, floats)),
        (interpreter, "_patch_lang", _patch(interpreter)),
        (interpreter.InterpretedFunction, "__call__", _call),
        *_elementwise(builder, handle, tl, wide, narrow),
        (builder, "cast_impl", _cast(builder, handle, tl, wide, narrow)),
        (builder, "create_dot", _dot(interpreter, floats)),
        (interpreter.ReduceOps, "sum", _sum(tl, wide, narrow)),
        (interpreter.ReduceOps, "min_max", _refuse(interpreter.ReduceOps.min_max, tl)),
        (
            interpreter.ReduceOps,
            "generic_reduce",
            _refuse(interpreter.ReduceOps.generic_reduce, tl),
        ),
        (interpreter.ScanOps, "apply_impl", _refuse(interpreter.ScanOps.apply_impl, tl)),
    ]


def _convert(interpreter: Any, floats: Floats) -> Callable[..., Any]:
    original = interpreter._convert_float

    def convert(data: Any, source: Any, wanted: Any, rounding: Any) -> Any:
        known = source.scalar in floats.dtypes and wanted.scalar in floats.dtypes
        if not known or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return original(data, source, wanted, rounding)
        return floats.convert(data, source.scalar, wanted.scalar)

    return convert


def _patch(interpreter: Any) -> Callable[..., Any]:
    """Hands the interpreter all of Triton's language, whichever part of it a kernel's file names,
    since what the kernel calls may name another."""
    original, tl = interpreter._patch_lang, interpreter.tl
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    return lambda function: original(both)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function called by a kernel. Triton is in the interpreter's hands already; doing that
    again at every call costs more than the function, and is never undone."""
    return self.rewrite()(*args, **kwargs)


def _elementwise(builder: Any, handle: Any, tl: Any, wide: Any, narrow: Any) -> list[Change]:
    """bfloat16 through float32. Comparisons give int1, as elsewhere."""
    unary, binary, ternary = builder.unary_op, builder.binary_op, builder.ternary_op

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        if arg.dtype.scalar != tl.bfloat16:
            return unary(self, arg, op)
        return narrow(op(wide(arg).data))

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16 or op in BITWISE:
            return binary(self, left, right, op)
        made = op(wide(left).data, wide(right).data)
        return handle(made, tl.int1) if made.dtype == np.bool_ else narrow(made)

    def ternary_op(self: Any, one: Any, two: Any, three: Any, op: Any) -> Any:
        if op is np.where or three.dtype.scalar != tl.bfloat16:
            return ternary(self, one, two, three, op)
        return narrow(op(wide(one).data, wide(two).data, wide(three).data))

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar == tl.bfloat16:
            return narrow(wide(x).data * wide(y).data + wide(z).data)
        return handle(x.data * y.data + z.data, z.dtype.scalar)

    made: dict[str, Callable[..., Any]] = {
        "unary_op": unary_op,
        "binary_op": binary_op,
        "ternary_op": ternary_op,
        "create_fma": create_fma,
    }
    return [(builder, name, each) for name, each in made.items()]


def _cast(builder: Any, handle: Any, tl: Any, wide: Any, narrow: Any) -> Callable[..., Any]:
    original = builder.cast_impl

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        given, kind = source.dtype.scalar, wanted.scalar
        if given == kind or tl.bfloat16 not in (given, kind):
            return original(self, source, wanted)
        if kind == tl.bfloat16:
            return narrow(source.data)
        exact = wide(source)
        return exact if kind == tl.float32 else original(self, exact, wanted)

    return cast_impl


def _dot(interpreter: Any, floats: Floats) -> Callable[..., Any]:
    handle, tl = interpreter.TensorHandle, interpreter.tl
    short = interpreter._ir.INPUT_PRECISION.TF32

    def exact(arg: Any, as_given: bool) -> Any:
        kind = arg.dtype.scalar
        if kind == tl.float64 or kind.is_int():
            return arg.data.astype(np.float64)
        bits = floats.convert(arg.data, kind, tl.float32).view(np.uint32)
        if kind == tl.float32 and not as_given:
            bits = (bits + 0x1000) & np.uint32(0xFFFFE000)  # TF32 has 10 bits of a fraction
        return bits.view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, most: Any) -> Any:
        as_given = precision != short
        product = np.matmul(exact(a, as_given), exact(b, as_given))
        if d.dtype.scalar.is_int():
            product = product.astype(np.int64)
        return handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    return create_dot


def _sum(tl: Any, wide: Any, narrow: Any) -> Callable[..., Any]:
    def total(self: Any, given: Any) -> Any:
        exact = wide(given.handle)
        made = np.sum(exact.data, axis=self.axis, keepdims=self.keep_dims)
        if given.dtype.scalar == tl.bfloat16:
            made = narrow(made).data
        return self.to_tensor(made, given.dtype)

    return total


def _refuse(original: Callable[..., Any], tl: Any) -> Callable[..., Any]:
    """What would go by the raw bits of bfloat16: kernels convert them first, which is checked."""

    def checked(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        every = given if isinstance(given, tuple | list) else (given,)
        if any(each.dtype.scalar == tl.bfloat16 for each in every):
            raise TypeError("a reduction or scan of bfloat16: convert to float32 before it.")
        return original(self, given, *args, **kwargs)

    return checked
