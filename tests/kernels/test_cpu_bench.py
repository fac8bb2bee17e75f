"""The benchmark of the CPU kernels: shares of limits that were measured, not made up."""

import gguf
import numpy as np
import pytest
import torch

from kernels.cpu import bench, ops


def matrix(rows: int, columns: int) -> ops.Packed:
    values = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    raw = torch.from_numpy(np.ascontiguousarray(blocks)).flatten()
    return ops.pack(raw, "Q4_1", rows, columns)


def test_shares_follow_from_seconds_and_limits():
    made = [matrix(64, 128), matrix(32, 64)]
    report = bench.run(made, (1, 4), threads=1, rounds=2, read_bytes=1 << 20, peak_rounds=1 << 10)
    assert [(f.m, f.activations) for f in report.figures] == [
        (m, activations) for m in (1, 4) for activations in ("accurate", "fast")
    ]
    read = sum(weight.data.numel() for weight in made)
    for figure in report.figures:
        assert figure.of_bandwidth == pytest.approx(
            read / figure.seconds / report.limits.bytes_per_s
        )
        products = figure.m * (64 * 128 + 32 * 64) * (2 if figure.activations == "accurate" else 1)
        assert figure.of_peak == pytest.approx(
            products / figure.seconds / report.limits.products_per_s
        )


@pytest.mark.parametrize("isa", ops.instruction_sets())
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_limits_do_what_they_say(isa: str, threads: int):
    data = torch.randint(0, 256, (256 * 13,), dtype=torch.uint8)
    wanted = int(data.view(torch.int32).long().sum())
    made = ops.read_bytes(data, threads=threads, isa=isa)
    assert (made - wanted) % (1 << 32) == 0
    assert ops.multiply_bytes(10, threads=threads, isa=isa) == 10 * 16 * 64 * threads
