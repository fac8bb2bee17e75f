"""The same workers as Ray actors: killed, replaced, and told in time when their node is drained."""

from functools import partial
from pathlib import Path

import pytest
import ray

from cluster.raylocal.private import drain_node
from cluster.raylocal.session import RaySession
from cluster.settings import resolve
from tests.train.elastic.runs import (
    Killer,
    refuse_other_processes,
    refuse_other_samples,
)
from tests.train.elastic.test_kills import curve
from tests.train.elastic.tiny import Tiny, alone, build
from train.elastic.membership import Policy
from train.elastic.messages import Hello
from train.elastic.ray_workers import RayLauncher
from train.elastic.supervisor import Supervisor

pytestmark = pytest.mark.live
STEPS = 24


def test_a_killed_actor_is_replaced(tmp_path: Path):
    flags = {"data_dir": str(tmp_path / "data"), "ray.object_store_bytes": str(100 << 20)}
    job = Tiny(tmp_path / "job", STEPS, 0.02)
    job.folder.mkdir()
    with RaySession(resolve(flags=flags).settings, cpus=3):
        launcher = RayLauncher(partial(build, job))
        supervisor = Supervisor(Policy(2, wait_s=60), launcher)
        killer = Killer(3, 1, STEPS, 0.02, 2)
        supervisor.on_event = partial(killer, supervisor)
        report = supervisor.run(120)
        # A drained node is a notice to whoever is on it.
        context = ray.get_runtime_context()
        assert launcher.notices() == {}
        drain_node(context.gcs_address, context.get_node_id(), "spot reclaim", 60.0)
        [(node, notice_s)] = RayLauncher(partial(build, job)).notices().items()
        assert node == context.get_node_id() and 30 < notice_s <= 60
        assert {e.what.machine for e in report.journal if isinstance(e.what, Hello)} == {node}
    assert len(killer.killed) == 1
    assert curve(report.losses) == pytest.approx(alone(STEPS), abs=1e-9)
    assert [len(plan.ranks) for plan in report.plans()] == [2, 2]
    refuse_other_samples(job.folder, STEPS, whole=True)
    refuse_other_processes(report, job.folder, 3)
