"""A job gives a machine up and gets it back; its price is what such changes really cost it."""

from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

from tests.train.elastic.runs import (
    PRELOAD,
    refuse_other_processes,
    refuse_other_samples,
)
from tests.train.elastic.test_kills import curve
from tests.train.elastic.tiny import Tiny, alone, build
from train.elastic.membership import Policy
from train.elastic.messages import Finished, Plan
from train.elastic.process import ProcessLauncher
from train.elastic.supervisor import Journal, Report, Supervisor
from train.elastic.yielding import Change, Claim, Yielding, changes

USD_PER_H = 36.0  # one cent a second


def plan(generation: int, *ranks: str) -> Plan:
    return Plan(generation=generation, ranks=ranks, host="h", port=1, version=None)


def step(generation: int, number: int, step_s: float) -> Finished:
    return Finished(generation=generation, step=number, samples=0, loss=0.0, step_s=step_s)


def test_a_change_is_measured_from_step_to_step():
    journal = [
        Journal(0.0, plan(1, "a", "b")),
        Journal(5.0, step(1, 1, 1.0)),
        Journal(6.0, step(1, 2, 1.0)),
        Journal(6.5, plan(2, "a")),
        Journal(10.0, step(2, 3, 2.0)),  # 4 s after the last step, 2 of them a step
        Journal(12.0, step(2, 4, 2.0)),
        Journal(13.0, plan(3, "a", "b")),  # broken off before its first step
        Journal(14.0, plan(4, "a", "b", "c")),
        Journal(16.0, step(4, 5, 0.5)),
    ]
    assert changes(journal) == [Change(2, 2, 1, 2.0), Change(4, 1, 3, 3.5)]
    assert Change(2, 2, 1, 2.0).usd(USD_PER_H) == pytest.approx(0.04)
    assert changes(journal[:4]) == []


def test_a_claim_is_what_the_autoscaler_reads():
    signals = pytest.importorskip("autoscale.loop.signals", reason="the loop is not there yet")
    named = [field.name for field in fields(Claim)]
    assert named == [field.name for field in fields(signals.TrainingClaim)]


class Nobody:
    """A launcher that starts none."""

    def start(self, name: str, machine: str, address: tuple[str, int], key: bytes) -> None: ...
    def kill(self, name: str) -> None: ...
    def ending(self, name: str) -> str:
        return ""

    def notices(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def test_machines_are_given_before_the_first_is_left():
    """The supervisor obeys later, in its own thread; what was asked before counts all the same."""
    supervisor = Supervisor(Policy(3), Nobody(), machines=("a", "b", "c"))
    supervisor._obey()  # a worker on each
    for worker in supervisor.members.workers.values():
        worker.state = "running" if worker.machine != "c" else "starting"
    job = Yielding("j", supervisor, wanted=3, machine_usd_per_h=36.0, value_usd_per_h=1.0)
    for machine in ("b", "c", "c"):
        job.give(machine, 5.0)
    with pytest.raises(ValueError, match="it holds \\('a',\\)"):
        job.give("a", 5.0)
    assert job.claim().machines == ("a", "b", "c"), "workers are there still"
    while not supervisor._events.empty():
        supervisor._hear(0.0)
    assert supervisor.members.machines == ("a",)
    assert job.claim().machines == ("a", "b"), "who was still starting had nothing to hand over"
    for name in [w.name for w in supervisor.members.workers.values() if w.machine == "b"]:
        supervisor.members.lost(name)
    assert job.claim().machines == ("a",)
    job.take("c")
    assert job.claim().machines == ("a", "c")
    supervisor.over = True
    job.take("b")
    over = job.claim()
    assert (over.machines, over.wanted, over.least) == ((), 0, 0)


class Allocator:
    """Takes m1 at step 8 and returns it at step 20."""

    def __init__(self) -> None:
        self.claims: dict[str, Claim] = {}
        self.yielding: Yielding | None = None

    def __call__(self, supervisor: Supervisor, entry: Journal) -> None:
        assert self.yielding
        if not isinstance(entry.what, Finished):
            return
        if entry.what.step >= 8 and "first" not in self.claims:
            self.claims["first"] = self.yielding.claim()
            with pytest.raises(ValueError, match="m7 is none of"):
                self.yielding.give("m7", 30.0)
            self.yielding.give("m1", 30.0)
        elif entry.what.step >= 20 and "without" not in self.claims:
            claim = self.yielding.claim()
            if "m1" in claim.machines:
                return  # its worker's process is not gone yet
            self.claims["without"] = claim
            with pytest.raises(ValueError, match="runs on 1 machines or more"):
                self.yielding.give("m0", 30.0)
            self.yielding.take("m1")
        elif entry.what.step >= 38 and "last" not in self.claims:
            self.claims["last"] = self.yielding.claim()


def gaps(report: Report) -> list[float]:
    """Seconds from the end of one step to the beginning of the next where workers changed."""
    ended = [(e.at_s, e.what) for e in report.journal if isinstance(e.what, Finished)]
    return [
        at_s - before_s - made.step_s
        for (before_s, before), (at_s, made) in zip(ended, ended[1:], strict=False)
        if made.generation != before.generation
    ]


@pytest.mark.live
def test_a_machine_is_yielded_and_returned(tmp_path: Path):
    steps = 40
    launcher = ProcessLauncher(partial(build, Tiny(tmp_path, steps, 0.04)), preload=PRELOAD)
    supervisor = Supervisor(Policy(2), launcher, machines=("m0", "m1"))
    allocator = Allocator()
    allocator.yielding = Yielding(
        "tiny", supervisor, wanted=2, machine_usd_per_h=USD_PER_H, value_usd_per_h=1.0, guess_s=7.0
    )
    supervisor.on_event = partial(allocator, supervisor)
    report = supervisor.run(120)
    assert [len(made.ranks) for made in report.plans()] == [2, 1, 2]
    assert curve(report.losses) == pytest.approx(alone(steps), abs=1e-9)
    refuse_other_samples(tmp_path, steps, whole=True)
    refuse_other_processes(report, tmp_path, 3)
    claims = allocator.claims
    assert claims["first"].machines == claims["last"].machines == ("m0", "m1")
    assert claims["without"].machines == ("m0",)
    assert claims["first"].shrink_usd == pytest.approx(7.0 * 2 * 0.01), "nothing measured yet"
    stops = gaps(report)
    assert len(stops) == 2
    assert claims["without"].shrink_usd == pytest.approx(stops[0] * 1 * 0.01)
    asked, cost = claims["first"].shrink_usd, stops[0] * 2 * 0.01
    print(f"asked {asked:.4f} $, cost {cost:.4f} $; the next is asked {claims['last'].shrink_usd}")
    assert claims["last"].shrink_usd == pytest.approx(sum(stops) / 2 * 2 * 0.01)
