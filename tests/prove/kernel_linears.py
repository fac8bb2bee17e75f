"""Proof rows of the linears of the default model: how near they come to what this machine can do.

Limits and kernels are measured in turns in one run, medians; see kernels/cpu/bench.py.
"""

from collections.abc import Iterator

from kernels.cpu import bench
from models.load import load_for_cpu
from tests.prove.row import Row

MODEL = "smollm2-135m-instruct"
THREADS = 2
ROUNDS = 7
OF_BANDWIDTH = 0.85  # with one row
OF_PEAK = 0.5  # with many
ROWS = (1, 32, 512)


def rows() -> Iterator[Row]:
    """Every row of this module."""
    model = load_for_cpu(MODEL)
    matrices = [*(weight for layer in model.layers for weight in layer.matrices), model.head]
    report = bench.run(matrices, ROWS, threads=THREADS, rounds=ROUNDS)
    limits = report.limits
    machine = f"{limits.bytes_per_s / 1e9:.1f} GB/s and {limits.products_per_s / 1e9:.0f} G/s"
    for figure in report.figures:
        name = f"linears of a step, {figure.m} rows, {figure.activations}"
        measured = f"{figure.seconds * 1e3:.2f} ms of {machine}"
        if figure.m == 1:
            share, target, limit = figure.of_bandwidth, OF_BANDWIDTH, "memory"
        else:
            share, target, limit = figure.of_peak, OF_PEAK, "arithmetic"
        yield Row(name, f">= {target:.0%} of {limit}", f"{share:.0%}: {measured}", share >= target)
