"""Layer A: the repaired interpreter rounds as torch does, and unrepaired it would not."""

import importlib

import pytest
import torch
import triton
import triton.language as tl

from kernels.triton import launch
from kernels.triton.verify import repair
from tests.kernels.ops.measure import error

pytestmark = pytest.mark.usefixtures("only_interpreted")


@triton.jit
def convert(x, out, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < N)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < N)


@triton.jit
def compute(x, y, out, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    if KIND == "add":
        a += b
    elif KIND == "multiply":
        a *= b
    elif KIND == "divide":
        a = (a / b).to(a.dtype)
    elif KIND == "largest":
        a = tl.maximum(a, b)
    elif KIND == "negative":
        a = -a
    elif KIND == "less":
        a = tl.where(a < b, a, b)
    elif KIND == "sum":
        a += tl.sum(b, axis=0).to(a.dtype)
    elif KIND == "highest":
        a += tl.max(b, axis=0).to(a.dtype)
    tl.store(out + at, a)


@triton.jit
def multiply(a, b, out, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    at = row * BLOCK + column
    acc = tl.zeros((BLOCK, BLOCK), out.dtype.element_ty)
    acc = tl.dot(
        tl.load(a + at), tl.load(b + at), acc, input_precision=PRECISION,
        out_dtype=out.dtype.element_ty,
    )  # fmt: skip
    tl.store(out + at, acc)


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    convert[(1,)](x, out, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return out


def wild() -> torch.Tensor:
    """Ties, subnormals of every type, both zeros, infinities, NaN, and what is too large."""
    chance = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=chance).to(torch.int32)
    ties = (torch.arange(-40, 40) + 0.5) / 8
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e4, 449, 2.0**-134, 3e38])
    return torch.cat((bits.view(torch.float32), ties, special, torch.randn(500, generator=chance)))


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bits, but for those of NaN."""
    nan = wanted.float().isnan()
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    both = torch.equal(got.float().isnan(), nan)
    return both and torch.equal(got.view(size)[~nan], wanted.view(size)[~nan])


NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_float32_is_rounded_as_torch_does(dtype):
    x = wild()
    assert same(converted(x, dtype), x.to(dtype))


def test_e4m3fn_has_no_infinity():
    """GPUs take the largest number instead."""
    x = torch.tensor([449.0, 1e9, torch.inf, -torch.inf])
    assert converted(x, torch.float8_e4m3fn).float().tolist() == [448, 448, 448, -448]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_narrow_number_is_read_right(dtype):
    size = torch.int16 if dtype.itemsize == 2 else torch.uint8
    codes = torch.arange(256**dtype.itemsize).to(size).view(dtype)
    assert same(converted(codes, torch.float32), codes.float())


def test_unrepaired_it_cuts_off():
    """So that a new version of Triton which needs no repair is noticed."""
    x = torch.tensor([1.0 + 2**-8 + 2**-9])
    assert converted(x, torch.bfloat16) == 1.0078125
    module = importlib.import_module("triton.runtime.interpreter")
    rounded = module._convert_float
    bits = x.numpy()
    assert rounded(bits, tl.float32, tl.bfloat16, None).item() == 0x3F81
    kept = rounded.__closure__
    original = next(c.cell_contents for c in kept if callable(c.cell_contents))
    assert original(bits, tl.float32, tl.bfloat16, None).item() == 0x3F80


KINDS = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "largest": torch.maximum,
    "negative": lambda a, b: -a,
    "less": torch.minimum,
    "sum": lambda a, b: a + b.float().sum().to(a.dtype),
    "highest": lambda a, b: a + b.max(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_is_rounded_once(kind, dtype):
    chance = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 64, generator=chance).to(dtype)
    out = torch.empty_like(a)
    compute[(1,)](a, b, out, KIND=kind, BLOCK=64)
    wanted = KINDS[kind](a, b)
    # torch adds and divides in another order, or with more care.
    steps = 4 if kind in ("sum", "divide") else 0
    off = (out.double() - wanted.double()).abs()
    assert (off <= steps * torch.finfo(dtype).eps * (wanted.double().abs() + steps)).all()


@triton.jit
def _later(a, b):
    return b


@triton.jit
def reduce(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out, tl.reduce(tl.load(x + at), 0, _later))


def test_what_would_go_by_raw_bits_is_refused():
    x = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="a reduction or scan of bfloat16: convert to float32"):
        reduce[(1,)](x, torch.empty_like(x), BLOCK=8)


def product(a: torch.Tensor, b: torch.Tensor, out: torch.dtype, precision: str) -> torch.Tensor:
    made = torch.empty(a.shape, dtype=out)
    multiply[(1,)](a, b, made, PRECISION=precision, BLOCK=a.shape[0])
    return made


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_products_are_those_of_the_numbers(dtype):
    chance = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 32, 32, generator=chance).to(dtype)
    got = product(a, b, torch.float32, "ieee")
    assert error(got, a.double() @ b.double()).rms < 1e-6


def test_int8_products_are_exact_at_the_extremes():
    a, b = torch.full((32, 32), -128, dtype=torch.int8), torch.full((32, 32), -128).to(torch.int8)
    b[:, ::2] = 127
    wanted = a.long() @ b.long()
    assert torch.equal(product(a, b, torch.int32, "tf32").long(), wanted)


def test_float32_products_are_tf32_unless_said_otherwise():
    """As on a GPU, where Triton's default rounds the operands to ten bits of a fraction."""
    chance = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 32, 32, generator=chance)
    wanted = a.double() @ b.double()
    exact = error(product(a, b, torch.float32, "ieee"), wanted).rms
    rough = error(product(a, b, torch.float32, "tf32"), wanted).rms
    assert exact < 1e-6 < 1e-4 < rough < 1e-3


def test_the_repair_ends_with_its_block():
    module = importlib.import_module("triton.runtime.interpreter")
    before = module.InterpreterBuilder.create_dot, module._convert_float
    with repair.repaired():
        assert module.InterpreterBuilder.create_dot is not before[0]
    assert (module.InterpreterBuilder.create_dot, module._convert_float) == before


def test_without_the_interpreter_there_is_nothing_to_repair(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert not launch.interpreting()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 was set before"), repair.repaired():
        pass
