"""Proof rows of workers that outlive their peers: seeded kills, beside plain Ray Train v2 killed in
the same way; Gemini's failure sets; elastic runs; a machine yielded and returned.

All run the tests' tiny job in float64, so that equal curves are equal numbers.
"""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from math import comb
from pathlib import Path
from typing import NamedTuple

from cluster.raylocal.session import RaySession
from cluster.settings import resolve
from tests.prove.attempt import attempt
from tests.prove.environments import ray_train
from tests.prove.row import Row
from tests.prove.suites import Suite, run
from tests.train.elastic.runs import (
    Killer,
    refuse_other_processes,
    refuse_other_samples,
    supervise,
)
from tests.train.elastic.test_yielding import Allocator, gaps
from tests.train.elastic.tiny import Tiny, alone, build
from train.elastic.membership import Policy
from train.elastic.process import ProcessLauncher
from train.elastic.ray_workers import RayLauncher
from train.elastic.supervisor import Report, Supervisor
from train.elastic.yielding import Yielding
from train.resilience.gemini import fatal_sets, holders, survives

ROOT = Path(__file__).parents[2]
KILLS, STEPS, PAUSE_S = 20, 200, 0.006
SEED = 23
PEER_S = 420
RAY_STEPS = 300


class Mode(NamedTuple):
    """A way to train and to replace: copies of Gemini (0: whole replicas) and the policy."""

    name: str
    copies: int
    policy: Policy


MODES = (
    Mode("replicas, a spare stands by", 0, Policy(4, least=2, spares=1, wait_s=60)),
    Mode("replicas, four to three and back", 0, Policy(4, least=2)),
    Mode("Gemini, two copies, a spare stands by", 2, Policy(4, least=2, spares=1, wait_s=60)),
    Mode("Gemini, four to three and back", 2, Policy(4, least=2)),
)
SUITES = (
    Suite(
        "torn steps, a hanging worker, the store's folder removed, a whole group lost (falls back "
        "to the store and says what was lost), bytes to peers = (m - 1) shares; each mechanism's "
        "absence is noticed",
        ("tests/train/elastic/test_kills.py", "tests/train/elastic/test_gemini.py"),
    ),
    Suite(
        "1 -> 4 -> 2 -> 3 workers in one run, told in time: each step in one generation, 12 "
        "samples each, the curve of one process to 1e-9; replicas and Gemini",
        ("tests/train/elastic/test_elastic.py",),
    ),
    Suite(
        "who trains, in random histories; placements; re-cutting",
        ("tests/train/elastic/test_membership.py", "tests/train/elastic/test_gemini_placement.py"),
    ),
)


def rows() -> Iterator[Row]:
    """The table of the issue's resilience part."""
    for mode in MODES:
        yield from attempt(f"{KILLS} kills: {mode.name}", partial(kills, mode))
    yield from attempt("beside Ray Train", beside_ray_train)
    yield from attempt("Gemini's failure sets", failure_sets)
    yield from attempt("a machine yielded", yielded)
    for suite in SUITES:
        yield from attempt(suite.shows, partial(run, suite))


def kills(mode: Mode) -> Row:
    """Twenty workers killed in one run, against a run that nobody disturbed."""
    with tempfile.TemporaryDirectory() as name:
        quiet = Tiny(Path(name) / "quiet", STEPS, copies=mode.copies)
        job = Tiny(Path(name) / "job", STEPS, PAUSE_S, copies=mode.copies)
        for folder in (quiet.folder, job.folder):
            folder.mkdir()
        killer = Killer(SEED, KILLS, STEPS, 2 * PAUSE_S, 4)
        report = supervise(job, mode.policy, killer)
        whole = not mode.copies
        refuse_other_samples(job.folder, STEPS, whole)
        refuse_other_processes(report, job.folder, 4 + KILLS + mode.policy.spares)
        same_size = bool(mode.policy.spares)
        rival = (
            supervise(quiet, Policy(4)).losses if same_size else dict(enumerate(alone(STEPS), 1))
        )
    apart = max(abs(report.losses[step] - rival[step]) for step in rival)
    ok = len(killer.killed) == KILLS and report.lost() == []
    ok = ok and len(report.losses) == STEPS and apart <= (0.0 if same_size else 1e-9)
    return Row(
        f"{KILLS} seeded kill -9 of 4 workers: {mode.name}",
        "curve equal to the bit" if same_size else "curve of one process to 1e-9",
        f"{len(killer.killed)} kills, off by {apart:.1e}, every sample once, survivors' processes "
        f"kept; kill to next step {times(killer.resumed_s)}",
        ok,
    )


def times(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s (median; most {max(seconds):.2f} s)"


def beside_ray_train() -> Iterator[Row]:
    """The same job with 4 Ray actors killed, ours and plain Ray Train's, one after the other."""
    ours = {
        "the others go on at once": on_ray(Policy(4, least=2)),
        "a spare stands by": on_ray(Policy(4, least=2, spares=1, wait_s=60)),
        "the others wait for a new actor": on_ray(Policy(4, least=2, wait_s=60)),
    }
    theirs = peer()
    for name, (report, seconds) in ours.items():
        took_s = statistics.median(seconds)
        waits = name.endswith("new actor")
        yield Row(
            f"kill -9 of one of 4 Ray actors to the next step: {name}",
            "told" if waits else "<= 1/5 of plain Ray Train v2",
            f"{times(seconds)} of {len(seconds)}; Ray Train {theirs['resumed_s']:.2f} s (1/"
            f"{theirs['resumed_s'] / took_s:.0f}), {theirs['kept']} of its processes kept, resumed "
            f"at step {theirs['resumed_at']:.0f} after {theirs['killed_at']:.0f}; ours lost "
            f"{len(report.lost())} steps",
            waits or 5 * took_s <= theirs["resumed_s"],
        )


def on_ray(policy: Policy) -> tuple[Report, list[float]]:
    """A run on a Ray of our own with two kills, the second once all are there again."""
    with tempfile.TemporaryDirectory() as name:
        flags = {"data_dir": f"{name}/data", "ray.object_store_bytes": str(100 << 20)}
        job = Tiny(Path(name) / "job", RAY_STEPS, 0.05)
        job.folder.mkdir()
        with RaySession(resolve(flags=flags).settings, cpus=6):
            supervisor = Supervisor(policy, RayLauncher(partial(build, job)))
            killer = Killer(SEED, 2, RAY_STEPS // 3, 0.1, 4, spared=bool(policy.spares))
            supervisor.on_event = partial(killer, supervisor)
            report = supervisor.run(PEER_S)
    assert killer.killed and report.steps == RAY_STEPS
    return report, killer.resumed_s


def peer() -> dict[str, float]:
    """Plain Ray Train's figures, from its own environment."""
    with tempfile.TemporaryDirectory() as name:
        command = [str(ray_train()), "-m", "tests.prove.ray_train_peer", name, "0.05"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PEER_S, check=False
        )
    found = [line for line in done.stdout.splitlines() if line.startswith("PEER ")]
    if not found:
        raise RuntimeError(f"plain Ray Train told nothing: {done.stderr.strip()[-300:]}")
    [line] = found
    answer: dict[str, float] = json.loads(line.removeprefix("PEER "))
    return answer


def failure_sets() -> Iterator[Row]:
    """All C(N, k) sets of lost machines, tried one by one, against the closed form."""
    tried = wrong = 0
    for workers in range(6, 13):
        for copies in (2, 3, 4):
            placement = holders(workers, copies)
            for losses in range(workers + 1):
                sets = list(combinations(range(workers), losses))
                fatal = sum(not survives(placement, lost) for lost in sets)
                tried += len(sets)
                wrong += fatal != fatal_sets(workers, copies, losses)
    yield Row(
        "Gemini: recoverable failure sets, N = 6..12, m = 2..4, any k, all tried",
        "as the closed form says",
        f"{tried} sets, {wrong} counts off",
        wrong == 0,
    )
    two, three = (1 - fatal_sets(16, 2, lost) / comb(16, lost) for lost in (2, 3))
    yield Row(
        "Gemini: N = 16, m = 2: two and three lost machines survived",
        "93.3 % and 80.0 % (the paper's)",
        f"{two:.1%} and {three:.1%}",
        abs(two - 0.933) < 5e-4 and abs(three - 0.8) < 5e-4,
    )


def yielded() -> Row:
    """A machine given up and taken back; the price of the shrink beside what it cost."""
    usd_per_h = 36.0
    with tempfile.TemporaryDirectory() as name:
        job = Tiny(Path(name), 40, 0.04)
        supervisor = Supervisor(
            Policy(2), ProcessLauncher(partial(build, job)), machines=("m0", "m1")
        )
        allocator = Allocator()
        allocator.yielding = Yielding(
            "tiny", supervisor, wanted=2, machine_usd_per_h=usd_per_h, value_usd_per_h=1.0
        )
        supervisor.on_event = partial(allocator, supervisor)
        report = supervisor.run(PEER_S)
        refuse_other_samples(job.folder, 40, whole=True)
    apart = max(abs(report.losses[n] - loss) for n, loss in enumerate(alone(40), 1))
    shrink_s, growth_s = gaps(report)
    price = allocator.claims["last"].shrink_usd
    cost = shrink_s * 2 * usd_per_h / 3600
    return Row(
        "a machine yielded and returned, at 36 $/h a machine: price asked for the next shrink",
        "measured cost within x 5; curve to 1e-9",
        f"{price:.4f} $; the shrink cost {cost:.4f} $ ({shrink_s * 1e3:.0f} ms of two machines), "
        f"the growth {growth_s * 1e3:.0f} ms; curve off by {apart:.1e}; sizes "
        f"{[len(plan.ranks) for plan in report.plans()]}",
        cost / 5 <= price <= 5 * cost and apart <= 1e-9,
    )
