"""The CPU kernels against what this machine can do: memory read, and products of bytes, in one run.

A linear with few rows is bound by reading its weights, with many by multiplying; so every figure is
a share of one of the two limits, which are measured in turns with the kernels (medians). Called by
`sanderling bench kernels`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from kernels.cpu import ops

READ_BYTES = 256 << 20  # more than any cache that two cores share
PEAK_ROUNDS = 1 << 19
PASSES = {"accurate": 2, "fast": 1}  # products of bytes for one of a weight and an activation
FIXED_PASSES = 3  # in 16-bit fixed point, see ops


class Limits(NamedTuple):
    """What the machine did at its best."""

    bytes_per_s: float
    products_per_s: float


class Figure(NamedTuple):
    """All linears of a model over m rows: seconds, and the share of either limit."""

    m: int
    activations: ops.Activations
    seconds: float
    of_bandwidth: float
    of_peak: float


class Report(NamedTuple):
    """One run."""

    limits: Limits
    figures: list[Figure]


def run(
    matrices: Sequence[ops.Packed],
    rows: Sequence[int] = (1, 8, 32, 256),
    *,
    threads: int,
    rounds: int = 5,
    isa: str = "auto",
    read_bytes: int = READ_BYTES,
    peak_rounds: int = PEAK_ROUNDS,
    batch_invariant: bool = True,
) -> Report:
    """matrices: those of one step of a model. Every round takes each measure once."""
    data = torch.ones(read_bytes, dtype=torch.uint8)
    tasks: dict[object, Callable[[], object]] = {
        "read": lambda: ops.read_bytes(data, threads=threads, isa=isa),
        "multiply": lambda: ops.multiply_bytes(peak_rounds, threads=threads, isa=isa),
    }
    for m in rows:
        for activations in PASSES:
            tasks[m, activations] = _linears(
                matrices, m, activations, threads, isa, batch_invariant
            )
    times: dict[object, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            started_s = time.perf_counter()
            task()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - started_s)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    products = peak_rounds * 16 * 64 * threads
    limits = Limits(read_bytes / seconds["read"], products / seconds["multiply"])
    figures = [
        _figure(
            matrices,
            m,
            activations,
            _passes(m, activations, isa, batch_invariant),
            seconds[m, activations],
            limits,
        )
        for m in rows
        for activations in PASSES
    ]
    return Report(limits, figures)


def _passes(m: int, activations: str, isa: str, batch_invariant: bool) -> int:
    """Products of bytes that the units or lanes make for one of a weight and an activation."""
    fixed = (
        not batch_invariant and m >= ops.FEWEST_FIXED_ROWS[activations] and isa in ("auto", "amx")
    )
    return FIXED_PASSES if fixed and ops.has_matrix_units() else PASSES[activations]


def _linears(
    matrices: Sequence[ops.Packed],
    m: int,
    activations: str,
    threads: int,
    isa: str,
    batch_invariant: bool,
) -> Callable[[], object]:
    widest = max(weight.columns for weight in matrices)
    x = torch.randn(m, widest, generator=torch.Generator().manual_seed(m))

    def task() -> None:
        chosen: ops.Activations = activations  # type: ignore[assignment]
        ops.linears(
            x,
            matrices,
            activations=chosen,
            threads=threads,
            isa=isa,
            batch_invariant=batch_invariant,
        )

    return task


def _figure(
    matrices: Sequence[ops.Packed],
    m: int,
    activations: str,
    passes: int,
    seconds: float,
    limits: Limits,
) -> Figure:
    read = sum(weight.data.numel() for weight in matrices)
    products = passes * m * sum(w.padded_rows * w.columns for w in matrices)
    return Figure(
        m,
        activations,  # type: ignore[arg-type]
        seconds,
        read / limits.bytes_per_s / seconds,
        products / limits.products_per_s / seconds,
    )
