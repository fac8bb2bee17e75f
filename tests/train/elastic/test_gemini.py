"""Shared-out state in peers' memory: torn steps, a removed store, a whole group lost, the bytes."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.train.elastic.runs import (
    hellos,
    refuse_other_processes,
    refuse_other_samples,
    supervise,
)
from tests.train.elastic.test_kills import curve
from tests.train.elastic.tiny import Tiny, alone, logged
from train.elastic.membership import Policy
from train.elastic.messages import Finished, Hello, Plan, Resumed
from train.elastic.supervisor import Journal, Report, Supervisor

pytestmark = pytest.mark.live
STEPS = 24
REPLACED = Policy(4, spares=1, wait_s=60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    job = Tiny(tmp_path_factory.mktemp("undisturbed"), STEPS, copies=2)
    return curve(supervise(job, Policy(4)).losses)


def resumed(report: Report) -> list[Resumed]:
    """Of the generations after the first."""
    found = [entry.what for entry in report.journal if isinstance(entry.what, Resumed)]
    return [what for what in found if what.generation > 1]


@pytest.mark.parametrize("place", ["torn", "reduced"])
def test_a_step_torn_by_a_kill_leaves_the_version_before_it_whole(
    place: str, tmp_path: Path, undisturbed: list[float]
):
    job = Tiny(tmp_path, STEPS, copies=2, kill=(9, place))
    report = supervise(job, REPLACED)
    assert (tmp_path / "killed").exists()
    assert curve(report.losses) == undisturbed
    assert report.lost() == []
    refuse_other_samples(tmp_path, STEPS, whole=False)
    refuse_other_processes(report, tmp_path, 6)
    again = resumed(report)
    assert sorted(what.rank for what in again) == [0, 1, 2, 3]
    # Nearest first: who has its share takes it from there; only the newcomer, whatever its rank,
    # asks a peer.
    from_here = sorted((what.local_bytes > 0, what.peer_bytes > 0) for what in again)
    assert from_here == [(False, True), *[(True, False)] * 3]
    assert all(what.store_bytes == 0 for what in again)


@pytest.mark.parametrize("fault", ["no commit", "no snapshot"])
def test_what_the_torn_step_needs(fault: str, tmp_path: Path, undisturbed: list[float]):
    """Each mechanism left out is missed: state is lost, or the curve is another."""
    job = Tiny(tmp_path, STEPS, copies=2, kill=(9, "torn"), fault=fault)
    report = supervise(job, REPLACED)
    assert (tmp_path / "killed").exists()
    assert report.lost() or curve(report.losses) != undisturbed


def test_bytes_to_peers_are_copies_less_one_times_the_share(tmp_path: Path):
    for copies in (2, 3):
        folder = tmp_path / str(copies)
        folder.mkdir()
        supervise(Tiny(folder, 4, copies=copies), Policy(4))
        for lines in logged(folder).values():
            for line in (line for line in lines if "copied" in line):
                sent, times, share = (int(str(line[n])) for n in ("copied", "copies", "share"))
                assert sent == (copies - 1) * share * times > 0
                assert times == int(str(line["step"])) + 1, "each step, and once at the start"


class Removal:
    """At a step: removes the store's folder, or not, and kills these workers at once, by name or by
    rank (who comes late is a spare, so worker n is not always rank n)."""

    def __init__(self, step: int, victims: tuple[str | int, ...], folder: Path | None) -> None:
        self._step, self._victims, self._folder = step, victims, folder
        self._pids: dict[str, int] = {}
        self.ranks: tuple[str, ...] = ()
        self.done = False

    def __call__(self, supervisor: Supervisor, entry: Journal) -> None:
        if isinstance(entry.what, Hello):
            self._pids[entry.worker] = entry.what.pid
        if isinstance(entry.what, Plan) and not self.done:
            self.ranks = entry.what.ranks
        due = isinstance(entry.what, Finished) and entry.what.step >= self._step
        if due and not self.done:
            self.done = True
            if self._folder:
                shutil.rmtree(self._folder)
            for victim in self._victims:
                name = self.ranks[victim] if isinstance(victim, int) else victim
                os.kill(self._pids[name], signal.SIGKILL)


def test_peers_are_enough_without_the_store(tmp_path: Path, undisturbed: list[float]):
    removal = Removal(14, (3,), tmp_path / "store")
    report = supervise(Tiny(tmp_path, STEPS, 0.04, copies=2, store_every=12), REPLACED, removal)
    assert removal.done
    assert curve(report.losses) == undisturbed
    assert report.lost() == []
    assert sum(what.store_bytes for what in resumed(report)) == 0


def test_a_whole_group_lost_falls_back_to_the_store_and_says_so(
    tmp_path: Path, undisturbed: list[float]
):
    """Ranks 2 and 3 hold each other's shares."""
    removal = Removal(16, (2, 3), None)
    report = supervise(Tiny(tmp_path, STEPS, 0.04, copies=2, store_every=5), REPLACED, removal)
    assert removal.done
    assert curve(report.losses) == undisturbed
    lost = " ".join(report.lost())
    assert "share 2 of 4" in lost and "share 3 of 4" in lost and "share 1" not in lost
    back = [what for what in resumed(report) if what.store_bytes]
    # The newest that was whole when they died; a busy machine may not have written 15 by then.
    steps = {what.step for what in back}
    assert len(steps) == 1 and steps <= {10, 15} and len(back) == 4
    refuse_other_samples(tmp_path, STEPS, whole=False)
    survivors = {name: pid for name, pid in hellos(report).items() if name in removal.ranks[:2]}
    assert {name: logged(tmp_path)[name][-1]["pid"] for name in survivors} == survivors


def test_shares_are_cut_anew_when_the_world_shrinks(tmp_path: Path):
    removal = Removal(10, ("w1",), None)
    job = Tiny(tmp_path, STEPS, 0.04, copies=2)
    report = supervise(job, Policy(4, least=2), removal)
    assert {len(plan.ranks) for plan in report.plans()} >= {3, 4}
    assert curve(report.losses) == pytest.approx(alone(STEPS), abs=1e-9)
    assert report.lost() == []
    refuse_other_samples(tmp_path, STEPS, whole=False)
