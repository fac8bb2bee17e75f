"""Proof rows of what workers send: bytes on the counting transport, ratios against the papers,
losses against Adam's, and steps on a throttled link."""

import itertools
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.prove.row import Row
from tests.prove.suites import Suite, run
from tests.train.communication import (
    test_dgc,
    test_onebit,
    test_overlap,
    test_powersgd,
    test_qsgd,
)
from tests.train.communication.learning import job, losses
from tests.train.communication.threads import on_threads
from tests.train.processes import on_ranks
from train.communication.compressor import Part
from train.communication.qsgd import STRETCH
from train.data.corpus import encode_bytes, prepare
from train.data.spelling import END_ID
from train.data.texts import documents

FOLDER = "tests/train/communication"
STEPS, RATE = 240, 1.4e-3
SEEDS, FEWER = range(5), range(3)
PUBLISHED = {1: 243, 2: 136, 4: 72}


def rows() -> Iterator[Row]:
    """Every row of this module; about four minutes on an idle machine."""
    yield from powersgd()
    yield from dgc()
    yield from qsgd()
    yield from onebit()
    yield from overlap()
    name = "counts = the kernel's on TCP, hooks on DDP"
    yield run(Suite(name, (f"{FOLDER}/test_transport.py",)))
    yield run(Suite("every compressor: one suite", (f"{FOLDER}/test_compressors.py",)))
    name = "jobs: refusals, resumed to the bit"
    yield run(Suite(name, (f"{FOLDER}/test_compressed_job.py",)))


def powersgd() -> Iterator[Row]:
    """The ratio of the paper's shapes, and torch's hook."""
    dense = 4 * Part("all", test_powersgd.resnet18()).elements
    for rank, published in PUBLISHED.items():
        [sent, _] = on_threads(2, test_powersgd.sent_by_one_step, rank)
        ratio = dense / sent
        check = f"PowerSGD, ResNet-18, rank {rank}: dense / sent"
        ok = abs(ratio / published - 1) < 0.01
        yield Row(check, f"{published} within 1 %", f"{ratio:.1f}", ok)
    ranks = on_ranks(2, test_powersgd.compared)
    worst = max(rank["same"] for rank in ranks)
    check = "PowerSGD: weights after 6 steps of DDP"
    yield Row(check, "1e-6 of torch's hook", f"{worst:.1e}", worst < 1e-6)
    least = min(value for rank in ranks for name, value in rank.items() if name != "same")
    yield Row("PowerSGD without feedback or base", "> 1e-4 off", f"{least:.1e}", least > 1e-4)


def dgc() -> Iterator[Row]:
    """Bytes at 99.9 %."""
    part = Part("p", ((512, 256), (704, 256), (256, 704), (256,), (256,)))
    [sent, _] = on_threads(2, test_dgc.one_step, part)
    share = sent / (4 * part.elements)
    check = "DGC at 99.9 %: bytes, indices too"
    yield Row(check, "<= 0.4 % of dense", f"{share:.3%}", share <= 0.004)
    suite = Suite("DGC = the paper's algorithm; mutations", (f"{FOLDER}/test_dgc.py",))
    yield run(suite)


def qsgd() -> Iterator[Row]:
    """The mean of many draws, and codes."""
    for levels in (1, 7, 127):
        far = test_qsgd.sigmas(*test_qsgd.draws(levels))
        check = f"QSGD, {levels} levels: mean of {test_qsgd.DRAWS} draws"
        yield Row(check, "within 4 sigma", f"{far:.2f} sigma", far < 4)
    far = test_qsgd.sigmas(*test_qsgd.draws(7, nearest=True))
    yield Row("QSGD rounding to nearest", "> 4 sigma", f"{far:.0f} sigma", far > 4)
    bits = {
        name: test_qsgd.expected_bits(1, code)
        for name, code in (("ours", test_qsgd.unary), ("theirs", test_qsgd.papers))
    }
    check = "QSGD, s = sqrt(n): bits a normal value"
    measured = f"{bits['ours']:.2f}; the paper's own code {bits['theirs']:.2f}"
    yield Row(check, "<= 2.8 (corollary 3.3)", measured, bits["ours"] <= 2.8)
    for levels in (1, 7):
        limit = test_qsgd.bound(levels, STRETCH)
        least = test_qsgd.written_bits(levels)["least"]
        check = f"QSGD, s = {levels}, n = {STRETCH}: bits of normal values"
        yield Row(check, f"<= {limit:.0f} (theorem 3.2)", f"{least:.0f}", least <= limit)
    yield run(Suite("QSGD: decoded exactly, variance bound", (f"{FOLDER}/test_qsgd.py",)))


def onebit() -> Iterator[Row]:
    """A small Llama on two ranks reading Python's help, byte for byte: loss on texts held out, with
    the same seeds on both sides. The learning rate is Adam's best of 0.7, 1, 1.4, 2 and 3 in a
    thousand; at 3 two orders of a sum already end up to 5 % apart."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        texts = itertools.islice(documents(("python",)), 400)
        prepare(corpus, texts, encode_bytes, END_ID, 20)

        def found(seed: int, change: Any = None, size: int = 2, **table: Any) -> dict[str, Any]:
            compression = {"kind": "onebit", **table} if table or change else {}
            tables = {"optimizer": {"learning_rate": RATE}, "compression": compression}
            return losses(corpus, job(STEPS, seed, **tables), change, size, held_out=True)

        adam = [found(seed)["held_out"] for seed in SEEDS]
        mine = [found(seed, warmup_steps="auto") for seed in SEEDS]
        other = found(0, size=1)["held_out"] / adam[0] - 1
        forgetful = [found(seed, test_onebit.forgetful) for seed in FEWER]
    ratio = mine[0]["dense"] / mine[0]["sent"]
    yield Row("1-bit Adam after the freeze: dense / sent", ">= 30", f"{ratio:.2f}", ratio >= 30)
    frozen = [one["freeze"].steps for one in mine]
    check = f"1-bit Adam, {STEPS} steps, frozen by the rule at {min(frozen)} to {max(frozen)}"
    measured, most = _more(mine, adam)
    yield Row(check, "mean + 2 errors <= 2 % over Adam", measured, most <= 0.02)
    check = "Adam against itself, summed in another order"
    yield Row(check, "within 0.5 %", f"{other:+.2%}", abs(other) < 0.005)
    measured, most = _more(forgetful, adam)
    yield Row("1-bit Adam without error feedback", "fails that check", measured, most > 0.02)
    yield run(Suite("1-bit Adam: until the freeze, alone, memory", (f"{FOLDER}/test_onebit.py",)))


def _more(runs: list[dict[str, Any]], adam: list[float]) -> tuple[str, float]:
    """Held-out loss over Adam's of the same seeds, in words; its mean and two standard errors."""
    more = [one["held_out"] / dense - 1 for one, dense in zip(runs, adam, strict=False)]
    mean, error = statistics.fmean(more), statistics.stdev(more) / math.sqrt(len(more))
    return f"{mean:+.2%}, error {error:.2%}, {len(more)} seeds", mean + 2 * error


def overlap() -> Iterator[Row]:
    """Steps on a throttled link of two processes; the slower of the two ranks."""
    ranks = on_ranks(2, test_overlap.every_case)
    for name in test_overlap.CASES:
        shares, serials = [], []
        for found in (rank[name] for rank in ranks):
            longer = max(found["compute"], found["send"])
            shares.append(found["overlapped"] / longer)
            serials.append(found["serial"] / longer)
        check = f"overlap, {name}: step / max(compute, send)"
        yield Row(check, "<= 1.15", f"{max(shares):.2f}", max(shares) <= 1.15)
        yield Row(f"{check}, no overlap", "> 1.15", f"{min(serials):.2f}", min(serials) > 1.15)
