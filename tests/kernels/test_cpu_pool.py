"""The pool of threads under stress: callers at once, more threads than cores, idle in between."""

import random
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from kernels.cpu import ops
from kernels.cpu.build import SOURCES

CALLS = 300


def weight(rows: int, columns: int) -> ops.Packed:
    values = np.random.default_rng(rows).standard_normal((rows, columns), dtype=np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    raw = torch.from_numpy(np.ascontiguousarray(blocks)).flatten()
    return ops.pack(raw, "Q4_1", rows, columns)


def test_callers_at_once_with_any_number_of_threads_get_their_own_results():
    weights = [weight(16 * n, 32 * n) for n in (1, 3, 8, 20)]
    inputs = [torch.randn(m, w.columns) for w in weights for m in (1, 5)]
    pairs = list(zip(inputs, [w for w in weights for _ in (1, 5)], strict=True))
    wanted = [ops.linear(x, w) for x, w in pairs]

    def call(number: int) -> bool:
        chance = random.Random(number)
        at = chance.randrange(len(pairs))
        if chance.random() < 0.1:
            time.sleep(0.002)  # long enough for workers to park
        x, w = pairs[at]
        return torch.equal(ops.linear(x, w, threads=chance.randint(1, 8)), wanted[at])

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(CALLS)))


def test_an_idle_pool_costs_no_cpu():
    x, w = torch.randn(1, 64), weight(64, 64)
    ops.linear(x, w, threads=4)
    time.sleep(0.1)
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.1


def test_no_race_is_seen_by_the_thread_sanitizer(tmp_path: Path):
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    program = tmp_path / "race"
    command = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=thread", f"-I{SOURCES}"]
    sources = [str(Path(__file__).parent / "pool_race.cpp"), str(SOURCES / "pool.cpp")]
    made = subprocess.run(
        [*command, *sources, "-o", str(program), "-pthread"], capture_output=True, text=True
    )
    if made.returncode and "tsan" in made.stderr:
        pytest.skip("this compiler comes without the thread sanitizer")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[:4000]
