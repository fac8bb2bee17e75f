"""Proof rows of training in less memory: saved activations against float32 and against formulas,
gradients against exact ones, and runs that get 35 % of their state's bytes, Python and torch
included, against runs that get all they ask for.

The cap is RLIMIT_DATA: private memory. Files, mapped or cached, are not private; the kernel may
take their pages back at any time.
"""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.prove.row import Row
from tests.train import tiny
from tests.train.memory import capped, layers
from tests.train.memory.test_allocate import brute_force
from tests.train.memory.test_offload import late_oracle
from train.data.corpus import Corpus
from train.data.stream import SampleStream
from train.job import Job
from train.memory import codec
from train.memory.activations import CodedLayers
from train.memory.allocate import allocate, variance
from train.memory.disk import DiskTrainer
from train.memory.gact import Gact
from train.memory.offload import OffloadTrainer
from train.memory.plan import activation_bytes, disk_traffic
from train.memory.segments import lay_out
from train.precision import COMPUTE
from train.weights import read_start
from train.world import LocalWorld

WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "Mesa, 8 bits": ({"activations": "mesa"}, 3.3),
    "GACT, 8 bits": ({"activations": "gact", "bits": 8}, 3.3),
    "GACT, mean 4 bits": ({"activations": "gact", "bits": 4}, 5.5),
}
DRAWS = 64
LARGE = {"layers": 40, "hidden": 512, "heads": 8, "kv_heads": 8, "feed_forward": 1408}
LONG = {"layers": 36, "hidden": 384, "heads": 6, "kv_heads": 6, "feed_forward": 1024}
"""Half as many parameters, for float64, where equality can be told from rounding."""
SHARE = 0.35
STEPS = 3
ROUNDS = 5


def rows() -> Iterator[Row]:
    """Every row of this module."""
    torch.set_num_threads(1)
    yield from saved()
    yield from gradients()
    yield allocator()
    yield sensitivity()
    yield from late()
    yield from under_a_cap()
    yield from beside()


def coded(table: dict[str, Any], compute: str) -> CodedLayers:
    made = layers.build(layers.job(compute, **table))[1]
    assert made is not None
    return made


def saved() -> Iterator[Row]:
    """Bytes that the whole stack of layers keeps, counted by hooks and as live storages."""
    plain = layers.plain_bytes(layers.build(layers.job())[0])
    worst = 0.0
    for name, (table, least) in WAYS.items():
        made = coded(table, "float32")
        layers.gradient(made.model, layers.tokens())
        measured = layers.saved_bytes(made.model)
        job = layers.job(**table)
        planned = activation_bytes(job, layers.config(job), 2 * layers.TOKENS)[1]
        angles = 2 * layers.TOKENS * 16 * 4  # which the formula is not about
        worst = max(worst, abs(measured - angles - planned) / planned)
        ratio = plain / measured
        check = f"{name}: saved bytes, float32 / saved"
        yield Row(check, f">= {least}", f"{ratio:.2f}", ratio >= least)
    yield Row("saved bytes against the formula", "1 %", f"{worst:.1%}", worst <= 0.01)


def gradients() -> Iterator[Row]:
    """The mean of draws, and of what has no chance in it."""
    right = layers.gradient(layers.build(layers.job("float64"))[0], layers.tokens())[1]
    for name, (table, _) in WAYS.items():
        made = coded(table, "float64")
        total, first = torch.zeros_like(right), 0.0
        for draw in range(DRAWS):
            made.seed = draw
            total += layers.gradient(made.model, layers.tokens())[1]
            first = first or layers.relative(total, right)
        last = layers.relative(total / DRAWS, right)
        measured = f"{first:.4f} -> {last:.5f}, 1/{first / last:.1f}"
        check = f"{name}: gradient error, 1 draw -> mean of {DRAWS}"
        yield Row(check, "1/8 within 15 %", measured, abs(first / last / 8 - 1) <= 0.15)
    kept, codec.noise = codec.noise, _no_chance
    try:
        made = coded(WAYS["GACT, mean 4 bits"][0], "float64")
        found = [layers.gradient(made.model, layers.tokens())[1] for _ in range(2)]
    finally:
        codec.noise = kept
    fixed = layers.relative(sum(found) / 2, right) / layers.relative(found[0], right)  # type: ignore[arg-type]
    yield Row("without chance the mean stays off", "> 0.99", f"{fixed:.2f}", fixed > 0.99)


def _no_chance(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.full_like(like, 0.5)


def allocator(problems: int = 40) -> Row:
    """Six tensors of random sizes and sensitivities."""
    chance, equal = random.Random(), 0
    for _ in range(problems):
        names = [f"t{n}" for n in range(6)]
        elements = {name: chance.randint(1, 4000) for name in names}
        costs = {name: 10 ** chance.uniform(-6, 0) for name in names}
        mean = chance.uniform(1, 8)
        bits = allocate(costs, elements, mean, (1, 2, 4, 8))
        cost = sum(costs[name] * variance(bits[name]) for name in names)
        best = brute_force(costs, elements, mean * sum(elements.values()), (1, 2, 4, 8))
        equal += abs(cost - best) <= 1e-12 * best
    check = "GACT: bits of 6 tensors = brute force (4,096 choices)"
    return Row(check, "all", f"{equal} of {problems}", equal == problems)


def sensitivity(draws: int = 16) -> Row:
    """Variance of the gradient at mean 4 bits, shared out and equal."""
    made = coded(WAYS["GACT, mean 4 bits"][0], "float64")
    right = layers.gradient(layers.build(layers.job("float64"))[0], layers.tokens())[1]
    assert isinstance(made.codec, Gact)
    found = {}
    layers.gradient(made.model, layers.tokens())
    for bits in ("shared", "equal"):
        if bits == "equal":
            made.codec.bits = dict.fromkeys(made.codec.bits, 4)
        errors = []
        for draw in range(draws):
            made.seed = draw
            gradient = layers.gradient(made.model, layers.tokens())[1]
            errors.append(layers.relative(gradient, right) ** 2)
        found[bits] = statistics.mean(errors)
    ratio = found["shared"] / found["equal"]
    return Row(
        "GACT, mean 4 bits: variance / that of 4 bits each", "<= 1", f"{ratio:.2f}", ratio <= 1
    )


def late() -> Iterator[Row]:
    """ZeRO-Offload's one-step delayed update and its link."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = tiny.corpus(Path(folder))
        worst = 0.0
        for first in (0, 1, 3):
            job = tiny.job(memory={"offload": "cpu", "late_from_step": first})
            mine = OffloadTrainer(job, read_start(job), _stream(job, corpus), None)
            found = [mine.step(LocalWorld()).loss for _ in range(job.steps)]
            expected = late_oracle(job, corpus)[: len(found)]
            worst = max(worst, *(abs(a - b) for a, b in zip(found, expected, strict=True)))
        check = "ZeRO-Offload: losses, in time and late, against plain torch"
        yield Row(check, "1e-12", f"{worst:.0e}", worst <= 1e-12)


def _stream(job: Job, corpus: Corpus) -> SampleStream:
    return SampleStream(corpus.train, job.data.sequence_tokens, job.run.seed)


def large(compute: str, **memory: Any) -> Job:
    """A job whose state is gigabytes."""
    return tiny.job(
        model=LONG if compute == "float64" else LARGE,
        data={"sequence_tokens": 64},
        run={"tokens": 128 * STEPS, "batch_tokens": 128, "micro_batch_tokens": 128},
        precision={"compute": compute},
        memory=memory,
    )


def under_a_cap(*offloads: str) -> Iterator[Row]:
    """Processes of their own, each capped as a whole; state: bytes a parameter of the plain run."""
    cases = (("disk", "float64", 32), ("cpu", "bfloat16", 18))
    for offload, compute, each in cases:
        if offloads and offload not in offloads:
            continue
        slots = lay_out(_config(compute), 1 << 24).slots
        state = each * sum(slot.stop - slot.start for slot in slots)
        with tempfile.TemporaryDirectory() as folder:
            tiny.corpus(Path(folder) / "corpus")
            common: dict[str, Any] = {
                "corpus": f"{folder}/corpus",
                "folder": f"{folder}/run",
                "steps": STEPS,
            }
            host = {"offload": offload, "folder": f"{folder}/host"}
            plain = json.loads(large(compute).model_dump_json())
            mine = json.loads(large(compute, **host).model_dump_json())
            cap = round(SHARE * state)
            refused = capped.run(job=plain, cap_bytes=cap, **common)
            done = capped.run(job=mine, cap_bytes=cap, **common)
            free = json.loads(capped.run(job=plain, **common).stdout)
        name = "ZeRO-Infinity" if offload == "disk" else "ZeRO-Offload, mapped host tier"
        check = f"{name}: {state / 1e9:.2f} GB of state, {compute}, {cap / 1e9:.2f} GB in all"
        if done.returncode:
            yield Row(check, "finishes", done.stderr.strip().splitlines()[-1][:80], False)
            continue
        found = json.loads(done.stdout)
        off = max(abs(a / b - 1) for a, b in zip(found["losses"], free["losses"], strict=True))
        told = f"{len(found['losses'])} steps, losses within {off:.0e}"
        yield Row(check, "finishes, losses within 1e-12", told, off <= 1e-12)
        killed = refused.returncode != 0 and "memory" in refused.stderr.lower()
        told = "refused memory" if killed else f"status {refused.returncode}"
        yield Row("the same, plain", "refused memory", told, killed)
        if offload == "disk":
            yield from _traffic(found, compute)


def _config(compute: str) -> Any:
    return read_start(large(compute)).config


def _traffic(found: dict[str, Any], compute: str) -> Iterator[Row]:
    layout = lay_out(
        _config(compute), large(compute).memory.tile_bytes // COMPUTE[compute].itemsize
    )
    plan = disk_traffic(layout, COMPUTE[compute], 1, workers=1)
    planned = (plan.read_bytes, plan.written_bytes)
    for what, wanted, measured in zip(
        ("read", "written"), planned, found["moved"][-1], strict=True
    ):
        told = f"{measured / 1e9:.3f} GB of {wanted / 1e9:.3f} GB" + (
            "" if found["direct"] else " (no O_DIRECT here)"
        )
        check = f"ZeRO-Infinity: bytes {what} in a step, /proc/PID/io against the plan"
        yield Row(check, "1.00 to 1.10", told, wanted <= measured * 1.001 <= 1.1 * wanted)


def beside() -> Iterator[Row]:
    """Transfers beside computation, on this disk. The update cannot begin before the
    gradient's norm is known and has little to compute: what passes move can be hidden."""
    job = tiny.job(
        model=LARGE | {"layers": 8},
        data={"sequence_tokens": 64},
        run={"tokens": 512 * 64, "batch_tokens": 512, "micro_batch_tokens": 512},
        precision={"compute": "float32"},
        memory={"offload": "disk"},
    )
    with tempfile.TemporaryDirectory() as folder:
        corpus = tiny.corpus(Path(folder) / "corpus")
        disk = DiskTrainer(job, read_start(job), _stream(job, corpus), Path(folder) / "files")
        disk.step(LocalWorld())
        timed: dict[bool, list[Timed]] = {True: [], False: []}
        for number in range(2 * ROUNDS):
            ahead = number % 2 == 0
            timed[ahead].append(_timed(disk, ahead))
        disk.close()
    serial = Timed(*(statistics.median(found) for found in zip(*timed[False], strict=True)))
    ahead_ = Timed(*(statistics.median(found) for found in zip(*timed[True], strict=True)))
    computing_s = serial.passes_s - serial.moving_s
    bound_s = max(computing_s, serial.moving_s)
    told = f"{ahead_.passes_s / bound_s:.2f} (one after the other {serial.passes_s / bound_s:.2f})"
    check = "ZeRO-Infinity: passes / the longer of computing and moving"
    yield Row(check, "<= 1.15", told, ahead_.passes_s <= 1.15 * bound_s)
    ratio = ahead_.step_s / serial.step_s
    yield Row("ZeRO-Infinity: step / one after the other", "< 1", f"{ratio:.2f}", ratio < 1)
    yield _late_beside()


class Timed(NamedTuple):
    """A step: in all, its passes, and what the passes' transfers took."""

    step_s: float
    passes_s: float
    moving_s: float


def _timed(disk: DiskTrainer, ahead: bool) -> Timed:
    disk.tier.settle()
    disk.tier.ahead = ahead
    disk.tier.spans.clear()
    gradient, ended_s = disk.model.gradient, []

    def noted(*arguments: Any) -> Any:
        found = gradient(*arguments)
        ended_s.append(time.monotonic())
        return found

    disk.model.gradient = noted  # type: ignore[method-assign, assignment]
    started_s = time.monotonic()
    try:
        disk.step(LocalWorld())
    finally:
        disk.model.gradient = gradient  # type: ignore[method-assign]
    disk.tier.settle()
    stopped_s = time.monotonic()
    moved = [span for span in disk.tier.spans if span.ended_s <= ended_s[0]]
    moving_s = sum(span.ended_s - span.started_s for span in moved)
    return Timed(stopped_s - started_s, ended_s[0] - started_s, moving_s)


def _late_beside() -> Row:
    """How much of a late update's time lies within the passes."""
    job = tiny.job(
        model=LARGE | {"layers": 4},
        data={"sequence_tokens": 64},
        run={"tokens": 512 * 8, "batch_tokens": 512, "micro_batch_tokens": 512},
        precision={"compute": "float32"},
        memory={"offload": "cpu", "late_from_step": 1},
    )
    with tempfile.TemporaryDirectory() as folder:
        corpus = tiny.corpus(Path(folder))
        mine = OffloadTrainer(job, read_start(job), _stream(job, corpus), None)
        for _ in range(job.steps):
            mine.step(LocalWorld())
    shares = []
    for update, passes in zip(mine.late_spans, list(mine.pass_spans)[1:], strict=True):
        both = min(update[1], passes[1]) - max(update[0], passes[0])
        shares.append(both / (update[1] - update[0]))
    share = statistics.median(shares)
    check = "ZeRO-Offload: late update's time that lies within the passes"
    return Row(check, ">= 90 %", f"{share:.0%}", share >= 0.9)
