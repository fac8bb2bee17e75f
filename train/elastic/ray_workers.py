"""Workers as Ray actors, one each, on whatever nodes the cluster has; and the supervisor as one.

Thin shells: the actor's one long call is the worker's life. Ray restarts none of them; that is the
supervisor's decision. A node that Ray drains is a notice. Ray must be initialised.
"""

import time
from typing import Any

from cluster.raylocal.private import draining_nodes
from train.elastic.membership import Policy
from train.elastic.process import Build, work
from train.elastic.supervisor import Report, Supervisor

POLL_S = 0.5
"""How often the cluster is asked which nodes drain."""
UNTOLD_S = 30.0
"""The notice where a drain says no time: what clouds give at least."""


class RayWorker:
    """A worker's actor."""

    def live(
        self, build: Build, name: str, address: tuple[str, int], key: bytes, threads: int
    ) -> None:
        """The worker's whole life, in this actor's process. Its machine is the node's id."""
        import ray

        work(build, name, ray.get_runtime_context().get_node_id(), address, key, threads)


class RayLauncher:
    """Starts workers as actors. cpus: reserved for each; labels: of the nodes they may run on.
    machine, where one is asked for, is a node's id."""

    def __init__(
        self,
        build: Build,
        *,
        cpus: float = 1.0,
        threads: int = 1,
        labels: dict[str, str] | None = None,
    ) -> None:
        self._build, self._cpus, self._threads = build, cpus, threads
        self._labels = labels or {}
        self._actors: dict[str, Any] = {}
        self._lives: dict[str, Any] = {}
        self._asked_s, self._draining = 0.0, dict[str, float]()

    def start(self, name: str, machine: str, address: tuple[str, int], key: bytes) -> None:
        """See `Launcher`."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {"num_cpus": self._cpus, "max_restarts": 0}
        if self._labels:
            options["label_selector"] = self._labels
        if machine:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(machine, soft=False)
        elif not self._labels:
            options["scheduling_strategy"] = "SPREAD"
        actor: Any = ray.remote(RayWorker).options(**options).remote()
        self._actors[name] = actor
        self._lives[name] = actor.live.remote(self._build, name, address, key, self._threads)

    def kill(self, name: str) -> None:
        """See `Launcher`."""
        import ray

        actor = self._actors.pop(name, None)
        self._lives.pop(name, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def ending(self, name: str) -> str:
        """See `Launcher`."""
        import ray

        life = self._lives.get(name)
        if life is None:
            return "unknown to Ray"
        if not ray.wait([life], timeout=0)[0]:
            return ""
        try:
            ray.get(life)
        except ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {error}"
        return "its work was over"

    def notices(self) -> dict[str, float]:
        """See `Launcher`: nodes that Ray drains."""
        now_s = time.monotonic()
        if now_s - self._asked_s >= POLL_S:
            self._asked_s, self._draining = now_s, draining_nodes()
        wall_s = time.time()
        return {
            node: max(end_s - wall_s, 0.0) if end_s else UNTOLD_S
            for node, end_s in self._draining.items()
        }

    def close(self) -> None:
        """See `Launcher`."""
        for name in list(self._actors):
            self.kill(name)


class RaySupervisor:
    """The supervisor's actor, for a job that outlives whoever submitted it. Start it with
    max_concurrency >= 2 where `resize` or `release` are to be called while it runs."""

    def __init__(self, build: Build, policy: Policy, cpus: float = 1.0, threads: int = 1) -> None:
        import ray

        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        launcher = RayLauncher(build, cpus=cpus, threads=threads)
        self._supervisor = Supervisor(policy, launcher, host=host)

    def run(self, deadline_s: float = float("inf")) -> Report:
        """See `Supervisor`."""
        return self._supervisor.run(deadline_s)

    def resize(self, target: int) -> None:
        """See `Supervisor`."""
        self._supervisor.resize(target)

    def release(self, workers: tuple[str, ...], notice_s: float) -> None:
        """See `Supervisor`."""
        self._supervisor.release(workers, notice_s)
