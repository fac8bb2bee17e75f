"""Kernels that are wrong in one way each, for the layers that should notice; and right ones."""

import triton
import triton.language as tl


@triton.jit
def copy_rows(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """Right."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < N, other=0.0)
    tl.store(out + row * out_stride + column, value, mask=column < N)


@triton.jit
def store_past_the_end(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < N, other=0.0)
    tl.store(out + row * out_stride + column, value, mask=column <= N)


@triton.jit
def load_past_the_end(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column)
    tl.store(out + row * out_stride + column, value, mask=column < N)


@triton.jit
def all_store_one_row(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """Programs agree on what they store, and yet it is one place."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < N, other=0.0)
    tl.store(out + column, value, mask=column < N)


@triton.jit
def load_what_the_last_one_stored(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """A running sum down the rows, right when programs run in order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    before = tl.load(
        out + (row - 1) * out_stride + column, mask=(column < N) & (row > 0), other=0.0
    )
    value = tl.load(x + row * x_stride + column, mask=column < N, other=0.0)
    tl.store(out + row * out_stride + column, before + value, mask=column < N)


@triton.jit
def store_what_another_loads(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """Each program clears the row behind the one that it reads."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < N, other=0.0)
    tl.store(out + row * out_stride + column, value, mask=column < N)
    last = row == tl.num_programs(0) - 1
    tl.store(x + (row - 1) * x_stride + column, value, mask=(column < N) & last)


@triton.jit
def sum_undefined_lanes(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """Masked lanes have no value, and are summed."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < N)
    tl.store(out + row * out_stride + column, tl.sum(value, axis=0) + value, mask=column < N)


@triton.jit
def lanes_meet(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < N, other=0.0)
    tl.store(out + row * out_stride + column // 2, value, mask=column < N)


@triton.jit
def narrow_product(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """Row times stride in 32 bits."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < N, other=0.0)
    tl.store(out + row.to(tl.int64) * out_stride + column, value, mask=column < N)


@triton.jit
def narrow_product_in_a_loop(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """The product is carried to the next turn of the loop, and widened when it is too late."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0) * 0
    for turn in range(N):
        value = tl.load(x + at.to(tl.int64) + column, mask=column < N, other=0.0)
        tl.store(out + row * out_stride + column, value, mask=column < N)
        at = turn * x_stride


@triton.jit
def narrow_page(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """A number from memory times a large constant."""
    column = tl.arange(0, BLOCK)
    page = tl.load(x).to(tl.int32) * 65536
    tl.store(out + page + column, column.to(tl.float32), mask=column < N)


@triton.jit
def spill(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """Far more numbers than one warp has registers for, all of them needed at the end."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < N, other=0.0)
    for _ in range(N):
        value = value * tl.sum(value, axis=0) + 1.0
    tl.store(out + row * out_stride + column, value, mask=column < N)


@triton.jit
def product(x, out, N, x_stride, out_stride, BLOCK: tl.constexpr):
    """One tile times itself, again and again: two tiles of BLOCK squared in shared memory, for
    every stage."""
    each = tl.arange(0, BLOCK)
    at = each.to(tl.int64)[:, None] * x_stride + each[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, N, BLOCK):
        left = tl.load(x + at + k)
        right = tl.load(x + tl.trans(at) + k)
        acc = tl.dot(left, right, acc)
    at = each.to(tl.int64)[:, None] * out_stride + each[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty))
