"""One run on 1, 4, 2 and 3 workers, told in time: no step is lost or made twice, each has the whole
batch, and the curve is that of one process."""

from functools import partial
from pathlib import Path

import pytest

from tests.train.elastic.runs import (
    PRELOAD,
    effective_ids,
    refuse_other_processes,
    refuse_other_samples,
    supervise,
)
from tests.train.elastic.test_kills import curve
from tests.train.elastic.tiny import Tiny, alone, build, logged
from train.elastic.membership import Policy
from train.elastic.messages import Finished, Idle, Plan
from train.elastic.process import ProcessLauncher
from train.elastic.supervisor import Journal, Supervisor

pytestmark = pytest.mark.live
STEPS = 48


class Nodes(ProcessLauncher):
    """Each worker on a machine of its own; w1's is to go once `told`."""

    told = False

    def start(self, name: str, machine: str, address: tuple[str, int], key: bytes) -> None:
        super().start(name, f"node of {name}", address, key)

    def notices(self) -> dict[str, float]:
        return {"node of w1": 30.0} if self.told else {}


def test_a_machine_that_goes_is_left_in_time(tmp_path: Path):
    """What a drained Ray node, or a provider's notice, comes to."""
    launcher = Nodes(partial(build, Tiny(tmp_path, 30, 0.03)), preload=PRELOAD)
    supervisor = Supervisor(Policy(2), launcher)

    def watch(entry: Journal) -> None:
        launcher.told |= isinstance(entry.what, Finished) and entry.what.step == 5

    supervisor.on_event = watch
    report = supervisor.run(120)
    assert "w1" in report.plans()[0].ranks and "w1" not in report.plans()[-1].ranks
    assert curve(report.losses) == pytest.approx(alone(30), abs=1e-9)
    idle = [entry.what for entry in report.journal if isinstance(entry.what, Idle)]
    assert {what.reason for what in idle} <= {"new", "paused", "done"}, "nobody was cut off"
    refuse_other_samples(tmp_path, 30, whole=True)
    assert any(e.what == "its machine goes in 30 s" and e.worker == "w1" for e in report.journal)


class Tide:
    """Grows to 4 at step 8, loses two by notice at 20 (the first two, a whole group of Gemini's),
    grows to 3 at 32."""

    def __init__(self) -> None:
        self.done: set[int] = set()
        self.ranks: tuple[str, ...] = ()

    def __call__(self, supervisor: Supervisor, entry: Journal) -> None:
        if isinstance(entry.what, Plan):
            self.ranks = entry.what.ranks
        if not isinstance(entry.what, Finished):
            return
        step, size = entry.what.step, len(self.ranks)
        for at, needs in ((8, 1), (20, 4), (32, 2)):
            if step >= at and size == needs and at not in self.done:
                self.done.add(at)
                if at == 20:
                    supervisor.release((self.ranks[0], self.ranks[1]), notice_s=30.0)
                else:
                    supervisor.resize({8: 4, 32: 3}[at])


@pytest.mark.parametrize("copies", [0, 2], ids=["replicas", "gemini"])
def test_one_four_two_three(copies: int, tmp_path: Path):
    # Slow enough steps that a newcomer is there before the end.
    job = Tiny(tmp_path, STEPS, 0.05, copies=copies)
    report = supervise(job, Policy(1), Tide())
    sizes = [len(plan.ranks) for plan in report.plans()]
    # Newcomers may come one by one.
    assert sizes[0] == 1 and sizes[-1] == 3 and {1, 2, 3, 4} >= set(sizes) >= {1, 2, 4}
    assert curve(report.losses) == pytest.approx(alone(STEPS), abs=1e-9)
    assert report.lost() == []
    refuse_other_samples(tmp_path, STEPS, whole=not copies)
    refuse_other_processes(report, tmp_path, 5)
    tries = [
        (tried[0], line["generation"])
        for lines in logged(tmp_path).values()
        for line in lines
        if isinstance(tried := line.get("try"), list)
    ]
    assert len(set(tries)) == STEPS, "each in one generation"
    assert {len(ids) for ids in effective_ids(tmp_path).values()} == {12}
    idle = [entry.what for entry in report.journal if isinstance(entry.what, Idle)]
    assert {what.reason for what in idle} <= {"new", "paused", "gave", "done"}, "nobody was cut off"
    if copies:
        assert any(plan.givers for plan in report.plans()), "two that leave hand their shares over"
