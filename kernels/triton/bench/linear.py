"""Products with quantised weights, at the shapes of Llama-3-8B, against cuBLAS in bfloat16 and
torch's own int8 and fp8 products. Called by `__main__`."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernels.reference.linear_w4 import dequantize_w4
from kernels.reference.linear_w8 import dequantize_w8
from kernels.triton.bench.measure import Contender, Row, copies_for, relative_error
from kernels.triton.linear_fp8 import fp8_linear
from kernels.triton.linear_int8 import int8_linear
from kernels.triton.linear_w4 import w4_linear
from kernels.triton.linear_w8 import w8_linear

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
ROWS = (1, 8, 16, 32, 64, 256, 1024, 4096)
GROUP = 32
CHECKED_ROWS = 64  # larger products are the same kernels over more rows
HALF, FP8 = torch.bfloat16, torch.float8_e4m3fn


def rows(device: torch.device) -> Iterator[Row]:
    """A row for each shape and number of rows; small shapes first."""
    for n, k in SHAPES:
        for m in ROWS:
            yield Row(
                "linear",
                f"{n}x{k} M={m}",
                lambda n=n, k=k, m=m: _contenders(device, n, k, m),  # type: ignore[misc]
                n * k // 2 + n * k // GROUP * 2 + 2 * m * (n + k),
                2 * m * n * k,
            )


def _contenders(device: torch.device, n: int, k: int, m: int) -> list[Contender]:
    x = torch.randn(m, k, device=device, dtype=HALF)
    return [
        _w4(x, n, None),
        _w4(x, n, torch.float16),
        _w8(x, n),
        *_int8(x, n),
        *_fp8(x, n),
        _cublas(x, n),
    ]


def _clones(tensor: torch.Tensor) -> list[torch.Tensor]:
    size = tensor.numel() * tensor.element_size()
    return [tensor, *(tensor.clone() for _ in range(copies_for(size) - 1))]


def _scales(n: int, count: int, device: torch.device) -> torch.Tensor:
    return (torch.rand(n, count, device=device) * 0.01 + 0.001).half()


def _w4(x: torch.Tensor, n: int, least: torch.dtype | None) -> Contender:
    k = x.shape[1]
    stored = _clones(torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=x.device))
    scales = _scales(n, k // GROUP, x.device)
    mins = None if least is None else -7 * scales

    def call(i: int) -> torch.Tensor:
        return w4_linear(x, stored[i], scales, mins)

    def check() -> float:
        return relative_error(call(0), _plain(x, dequantize_w4(stored[0], scales, mins, HALF)))

    checked = check if x.shape[0] <= CHECKED_ROWS else None
    return Contender("w4" if mins is None else "w4-mins", call, True, len(stored), checked)


def _w8(x: torch.Tensor, n: int) -> Contender:
    k = x.shape[1]
    stored = _clones(torch.randint(-127, 128, (n, k), dtype=torch.int8, device=x.device))
    scales = _scales(n, k // GROUP, x.device)

    def call(i: int) -> torch.Tensor:
        return w8_linear(x, stored[i], scales)

    def check() -> float:
        return relative_error(call(0), _plain(x, dequantize_w8(stored[0], scales, HALF)))

    return Contender("w8", call, True, len(stored), check if x.shape[0] <= CHECKED_ROWS else None)


def _plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In slices of the weight, so that float32 copies stay small."""
    parts = [F.linear(x.float(), part.float()) for part in weight.split(16384)]
    return torch.cat(parts, dim=1)


def _int8(x: torch.Tensor, n: int) -> list[Contender]:
    """torch._int_mm gives sums only: ours scales them, too. It takes more than 16 rows."""
    m, k = x.shape
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=x.device)
    stored = _clones(torch.randint(-127, 128, (n, k), dtype=torch.int8, device=x.device))
    row, column = torch.rand(m, device=x.device), torch.rand(n, device=x.device)

    def call(i: int) -> torch.Tensor:
        return int8_linear(q, row, stored[i], column, None, HALF)

    def check() -> float:
        exact = _plain(q, stored[0]) * row[:, None] * column
        return relative_error(call(0), exact)

    ours = Contender("int8", call, True, len(stored), check if m <= CHECKED_ROWS else None)
    if m <= 16:
        return [ours]
    return [
        ours,
        Contender("_int_mm", lambda i: torch._int_mm(q, stored[i].t()), False, len(stored)),
    ]


def _fp8(x: torch.Tensor, n: int) -> list[Contender]:
    m, k = x.shape
    q = x.to(FP8)
    stored = _clones(torch.randn(n, k, dtype=HALF, device=x.device).to(FP8))
    row, column = torch.rand(m, device=x.device), torch.rand(n, device=x.device)

    def call(i: int) -> torch.Tensor:
        return fp8_linear(q, row, stored[i], column, HALF)

    def scaled(i: int) -> object:
        return torch._scaled_mm(
            q, stored[i].t(), scale_a=row[:, None], scale_b=column[None, :], out_dtype=HALF
        )

    def check() -> float:
        exact = _plain(q, stored[0]) * row[:, None] * column
        return relative_error(call(0), exact)

    return [
        Contender("fp8", call, True, len(stored), check if m <= CHECKED_ROWS else None),
        Contender("_scaled_mm", scaled, False, len(stored)),
    ]


def _cublas(x: torch.Tensor, n: int) -> Contender:
    weights = _clones(torch.randn(n, x.shape[1], dtype=HALF, device=x.device))
    return Contender("cublas-bf16", lambda i: F.linear(x, weights[i]), False, len(weights))
