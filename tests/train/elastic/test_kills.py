"""Workers are killed with -9; survivors go on, and the run is the one that nobody disturbed."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.train.elastic.runs import (
    Killer,
    refuse_other_processes,
    refuse_other_samples,
    supervise,
)
from tests.train.elastic.tiny import Tiny, alone
from train.elastic.membership import JobFailed, Policy
from train.elastic.messages import Finished, Hello, Idle
from train.elastic.supervisor import Journal, Supervisor

pytestmark = pytest.mark.live
STEPS, STEP_S = 36, 0.012
MODES = {"replicas": 0, "gemini": 2}


def curve(losses: dict[int, float]) -> list[float]:
    assert sorted(losses) == list(range(1, len(losses) + 1))
    return [losses[step] for step in sorted(losses)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Four workers, nobody killed."""
    job = Tiny(tmp_path_factory.mktemp("undisturbed"), STEPS)
    return curve(supervise(job, Policy(4)).losses)


def test_the_undisturbed_run_is_that_of_one_process(undisturbed: list[float]):
    assert undisturbed == pytest.approx(alone(STEPS), abs=1e-12)
    assert undisturbed[-1] < 0.9 * undisturbed[0], "it learns, so the curve says something"


@pytest.mark.parametrize("mode", MODES)
def test_killed_workers_are_replaced_and_the_curve_is_equal_to_the_bit(
    mode: str, tmp_path: Path, undisturbed: list[float]
):
    job = Tiny(tmp_path, STEPS, STEP_S, copies=MODES[mode])
    killer = Killer(7, 3, STEPS, 2 * STEP_S, 4)
    report = supervise(job, Policy(4, spares=1, wait_s=60), killer)
    assert len(killer.killed) == 3
    assert curve(report.losses) == undisturbed
    assert report.lost() == []
    refuse_other_samples(tmp_path, STEPS, whole=mode == "replicas")
    refuse_other_processes(report, tmp_path, 4 + 3 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["spare", "replacement", "shrink"])
def test_twenty_kills(mode: str, way: str, tmp_path: Path):
    steps = 200
    quiet = Tiny(tmp_path / "quiet", steps)
    job = Tiny(tmp_path / "job", steps, STEP_S, copies=MODES[mode])
    for folder in (quiet.folder, job.folder):
        folder.mkdir()
    killer = Killer(11, 20, steps, 2 * STEP_S, 4)
    policy = Policy(
        4, least=2, spares=1 if way == "spare" else 0, wait_s=0.0 if way == "shrink" else 60.0
    )
    report = supervise(job, policy, killer)
    assert len(killer.killed) == 20
    if way == "shrink":
        assert {len(plan.ranks) for plan in report.plans()} == {3, 4}
        assert curve(report.losses) == pytest.approx(alone(steps), abs=1e-9)
    else:
        assert curve(report.losses) == curve(supervise(quiet, Policy(4)).losses)
    assert report.lost() == []
    refuse_other_samples(job.folder, steps, whole=mode == "replicas")
    refuse_other_processes(report, job.folder, 4 + 20 + policy.spares)


def test_a_worker_that_hangs_is_killed_and_replaced(tmp_path: Path, undisturbed: list[float]):
    """SIGSTOP: its connections stay open, so only silence tells; the others wait in a collective,
    which the fence ends."""
    stopped: list[str] = []
    pids: dict[str, int] = {}

    def watch(supervisor: Supervisor, entry: Journal) -> None:
        if isinstance(entry.what, Hello):
            pids[entry.worker] = entry.what.pid
        if isinstance(entry.what, Finished) and entry.what.step == 9 and not stopped:
            stopped.append("w2")
            os.kill(pids["w2"], signal.SIGSTOP)

    job = Tiny(tmp_path, STEPS, STEP_S)
    report = supervise(job, Policy(4, spares=1, wait_s=60), watch, silence_s=3.0)
    assert stopped and any(e.what == "silent for 3 s" for e in report.journal)
    assert curve(report.losses) == undisturbed
    refuse_other_samples(tmp_path, STEPS, whole=True)


def test_a_supervisor_that_was_held_up_takes_nobody_for_silent(tmp_path: Path):
    held_up: list[str] = []

    def watch(supervisor: Supervisor, entry: Journal) -> None:
        if isinstance(entry.what, Idle) and not held_up:
            held_up.append(entry.worker)
            time.sleep(4.5)

    report = supervise(Tiny(tmp_path, 4), Policy(4), watch, silence_s=3.0)
    assert held_up and [len(plan.ranks) for plan in report.plans()] == [4]
    refuse_other_processes(report, tmp_path, 4)


def test_without_the_hand_over_a_newcomer_spoils_the_curve(
    tmp_path: Path, undisturbed: list[float]
):
    """The checks above can fail."""
    job = Tiny(tmp_path, STEPS, STEP_S, fault="nothing fetched")
    killer = Killer(7, 1, STEPS, 2 * STEP_S, 4)
    report = supervise(job, Policy(4, spares=1, wait_s=60), killer)
    assert curve(report.losses) != undisturbed
    with pytest.raises(AssertionError):
        refuse_other_samples(tmp_path, STEPS, whole=True)


def test_an_error_of_the_job_ends_it_with_its_words(tmp_path: Path):
    """It is not taken for a lost peer, which would be tried again for ever."""
    job = Tiny(tmp_path / "not" / "there", STEPS)
    with pytest.raises(JobFailed, match="FileNotFoundError"):
        supervise(job, Policy(2))
