"""Proof rows of the linears of the default model: how near they come to what this machine can do.

Limits and kernels are measured in turns in one run, medians; see kernels/cpu/bench.py. Each
instruction set is held against its own limit; the matrix units (amx) are used from 64 rows on, and
from two on with batch_invariant = False (together), which takes three products of bytes for one.
There few rows are bound by neither limit, but by unpacking the weights: their share is told.
"""

from collections.abc import Iterator

from kernels.cpu import bench, ops
from models.load import load_for_cpu
from tests.prove.row import Row

MODEL = "smollm2-135m-instruct"
THREADS = 2
ROUNDS = 9
OF_BANDWIDTH = 0.85  # with one row
OF_PEAK = 0.5  # with many
TOGETHER = (8, 32, 512)
FEW = 32
ROWS = {"lanes": (1, 32, 512), "amx": (512,)}


def rows() -> Iterator[Row]:
    """Every row of this module."""
    model = load_for_cpu(MODEL)
    matrices = [*(weight for layer in model.layers for weight in layer.matrices), model.head]
    lanes = next(isa for isa in ops.instruction_sets() if isa != "amx")
    chosen = {lanes: ROWS["lanes"]}
    if "amx" in ops.instruction_sets():
        chosen["amx"] = ROWS["amx"]
    for isa, counts in chosen.items():
        report = bench.run(matrices, counts, threads=THREADS, rounds=ROUNDS, isa=isa)
        yield from (_row(isa, figure, report.limits) for figure in report.figures)
    if "amx" in chosen:
        report = bench.run(
            matrices, TOGETHER, threads=THREADS, rounds=ROUNDS, isa="amx", batch_invariant=False
        )
        for figure in report.figures:
            row = _row("amx, together", figure, report.limits)
            yield row if figure.m > FEW else row._replace(target="told", ok=True)


def _row(isa: str, figure: bench.Figure, limits: bench.Limits) -> Row:
    name = f"linears of a step, {figure.m} rows, {figure.activations}, {isa}"
    if figure.m == 1:
        share, target, limit = figure.of_bandwidth, OF_BANDWIDTH, "memory"
        machine = f"{limits.bytes_per_s / 1e9:.1f} GB/s"
    else:
        share, target, limit = figure.of_peak, OF_PEAK, "arithmetic"
        machine = f"{limits.products_per_s / 1e9:.0f} G/s"
    measured = f"{share:.0%}: {figure.seconds * 1e3:.2f} ms of {machine}"
    return Row(name, f">= {target:.0%} of {limit}", measured, share >= target)
