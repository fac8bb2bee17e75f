"""Proof rows of one allocator for training and serving: while requests are many, the control loop
takes a machine from a training job, and gives it back afterwards.

The job is the tests' tiny one in float64 on two machines, the service SmolLM2-135M on a third; all
are processes of this machine with one thread each. Two spikes: the first shrink is priced by a
guess, the second by what the first changes cost. Then the same with a job that may not yield.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from autoscale.loop.actions import Return, Yield
from cluster.settings import Settings
from cluster.settings.autoscale import AutoscaleSettings
from tests.prove.attempt import attempt
from tests.prove.drill import requests_of
from tests.prove.drill_run import Scene, replayed, undisturbed
from tests.prove.row import Row
from tests.prove.shared_run import MARKET, USD_PER_H, Drill, Shares, play, quietly
from tests.train.elastic.runs import refuse_other_samples
from tests.train.elastic.tiny import Tiny, alone
from train.elastic.messages import Idle
from train.elastic.yielding import changes

STEPS, PAUSE_S = 700, 0.1
FEWER_STEPS = 200
FACTOR = 5.0
SETTINGS = {
    "engine": {"kv_tokens": 4096, "max_running": 2},
    "prefill": {"replicas": 0},
    "decode": {"threads": 1},
    "controller": {"period_s": 0.2},
}
AUTOSCALE = {
    "policy": "on_demand",
    "period_s": 0.5,
    "up_delay_s": 1.5,
    "down_delay_s": 3.0,
    "backlog_s": 2.0,
    "drain_s": 6.0,
    "short_usd_per_h": 200.0,
    "decode": {"floor": 1, "cap": 2},
    "prefill": {"cap": 0},
}


def rows() -> Iterator[Row]:
    """Every row of this module; about four minutes."""
    settings = Settings.model_validate(SETTINGS)
    autoscale = AutoscaleSettings.model_validate(AUTOSCALE)
    scene = Scene(settings, autoscale, MARKET, requests_of(settings), streams=6, lasts_s=0.0)
    with TemporaryDirectory(prefix="shared-") as name:
        yield from attempt("one allocator", partial(lent, scene, Path(name)))
    with TemporaryDirectory(prefix="kept-") as name:
        yield from attempt("a job that may not yield", partial(kept, scene, Path(name)))


def lent(scene: Scene, folder: Path) -> Iterator[Row]:
    """Two spikes, two machines lent and returned."""
    drill = Drill(scene, job(folder, STEPS))
    shares = play(drill, folder / "shared")
    yield from compared(drill, shares)
    numbers = sorted(shares.served.tokens)
    quiet = asyncio.run(undisturbed(quietly(drill), folder / "quiet", numbers))
    begun = len(shares.served.tokens.keys() | shares.served.lost.keys())
    lost = len(shares.served.lost) + len(quiet.lost)
    unlike = [n for n, made in shares.served.tokens.items() if made != quiet.tokens.get(n)]
    yield Row(
        "shared: requests lost; answers unlike the undisturbed service's",
        "0; 0",
        f"{lost} of {begun}; {len(unlike)}",
        begun > 0 and not lost and not unlike,
    )
    left = shares.served.left_over + shares.alive + quiet.left_over
    yield Row("shared: processes left over", "0", f"{left}", left == 0)


def job(folder: Path, steps: int) -> Tiny:
    """A job in a folder of its own."""
    made = Tiny(folder / "job", steps, PAUSE_S)
    made.folder.mkdir()
    return made


def compared(drill: Drill, shares: Shares) -> Iterator[Row]:
    """What a shared run is held to, but for its requests."""
    given, back = shares.asked(Yield), shares.asked(Return)
    sizes = [len(plan.ranks) for plan in shares.report.plans()]
    answering = replicas(shares)
    spikes = drill.spikes
    yield Row(
        f"shared: {spikes} spikes; machines yielded and returned, the job's sizes, replicas",
        f"{spikes} and {spikes}; 2" + ", 1, 2" * spikes + "; 1" + ", 2, 1" * spikes,
        f"{len(given)} and {len(back)}; {_listed(sizes)}; {_listed(answering)}",
        len(given) == len(back) == spikes
        and sizes == [2, *[1, 2] * spikes]
        and answering == [1, *[2, 1] * spikes],
    )
    steps = drill.job.steps
    apart = max(
        abs(shares.report.losses.get(n, 1e9) - loss) for n, loss in enumerate(alone(steps), 1)
    )
    refuse_other_samples(drill.job.folder, steps, whole=True)
    idle = [e.what.reason for e in shares.report.journal if isinstance(e.what, Idle)]
    cut = sum(reason not in ("new", "paused", "done") for reason in idle)
    yield Row(
        f"shared: {steps} steps in float64 against one undisturbed process; samples; steps cut off",
        "curve to 1e-9; each once; 0",
        f"off by {apart:.1e}; each once; {cut}",
        apart <= 1e-9 and cut == 0,
    )
    yield from prices(shares)
    alike, decisions = replayed(shares.served.log)
    yield Row(
        "shared: the log replays byte for byte",
        "all",
        f"{alike} of {decisions} decisions",
        alike == decisions > 0,
    )


def prices(shares: Shares) -> Iterator[Row]:
    """Of each shrink: the price that the loop decided by, and what it cost."""
    shrunk = [change for change in changes(shares.report.journal) if change.after < change.before]
    for number, ((step, act), change) in enumerate(
        zip(shares.asked(Yield), shrunk, strict=False), 1
    ):
        assert isinstance(act, Yield)
        [claim] = [claim for claim in step.signals.training if claim.job == act.job]
        cost = change.usd(USD_PER_H)
        ok = cost / FACTOR <= claim.shrink_usd <= cost * FACTOR
        yield Row(
            f"shared: price of shrink {number} beside its cost, {USD_PER_H:g} $/h a machine",
            "told (a guess)" if number == 1 else f"within x {FACTOR:g}",
            f"{claim.shrink_usd:.4f} $; {cost:.4f} $ ({change.stopped_s * 1e3:.0f} ms of "
            f"{change.before} machines)",
            ok or number == 1,
        )


def kept(scene: Scene, folder: Path) -> Row:
    """The mutation: the job needs both of its machines, so serving stays as it is."""
    drill = Drill(scene, job(folder, FEWER_STEPS), least=2, spikes=1, patience_s=15.0)
    shares = play(drill, folder / "kept")
    short = short_steps(shares)
    return Row(
        "shared, mutation: a job that may not yield; serving stays short",
        "1 replica, no machine yielded, short to the spike's end",
        f"replicas {_listed(replicas(shares))}, {len(shares.asked(Yield))} yielded, short in "
        f"{short} of {len(shares.steps)} decisions",
        replicas(shares) == [1] and not shares.asked(Yield) and short >= 20,
    )


def short_steps(shares: Shares) -> int:
    """Decisions at which fewer answered than were needed."""
    return sum(
        step.decision.needs["decode"].need > _answering(shares, number)
        for number, step in enumerate(shares.steps)
    )


def replicas(shares: Shares) -> list[int]:
    """How many answered, each number as often as it changed."""
    counts = [_answering(shares, number) for number in range(len(shares.steps))]
    return [n for place, n in enumerate(counts) if place == 0 or n != counts[place - 1]]


def _answering(shares: Shares, number: int) -> int:
    machines = shares.steps[number].signals.machines
    return sum(machine.role == "decode" and machine.phase == "ready" for machine in machines)


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)
