"""A served model as the controller sees one: /metrics, /status and POST /machines, over pods of the
double's cluster. The paths of the last are the product's own; the numbers are made up."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from serve.errors import RequestError
from serve.placing import placing_routes
from tests.kubernetes_double.operator import Cluster
from tests.kubernetes_double.store import At

KEY = "the key of the tests"
STATS = {"pages": 100, "free_pages": 60, "evictable_pages": 20, "waiting": 0, "reserved": 0}


@dataclass
class Replica:
    """ready_s, left_s: when it answers, and when its work has left it."""

    role: str
    ready_s: float
    left_s: float | None = None


@dataclass
class Served:
    """tokens_per_s: what is asked of it. starts_s, leaves_s: what a replica takes to answer, and to
    be rid of its work."""

    cluster: Cluster
    tokens_per_s: float = 100.0
    starts_s: float = 20.0
    leaves_s: float = 10.0
    replicas: dict[str, Replica] = field(default_factory=dict)
    drained: list[str] = field(default_factory=list)
    began_s: float | None = None

    @property
    def now_s(self) -> float:
        return self.cluster.store.now_s()

    def app(self) -> Starlette:
        """What httpx.ASGITransport takes."""
        key = "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()
        routes = [
            Route("/metrics", self._metrics),
            Route("/status", self._status),
            *placing_routes(self, key),
        ]
        return Starlette(routes=routes, exception_handlers={RequestError: _refused})

    async def place(self, role: str, machines: list[str], drain_s: float) -> None:
        for name in machines:
            ready_s = self.now_s + self.starts_s
            self.replicas.setdefault(name, Replica(role, ready_s))
        for name, replica in self.replicas.items():
            if replica.role == role and name not in machines and replica.left_s is None:
                replica.left_s = self.now_s + min(drain_s, self.leaves_s)

    async def leave(self, machine: str, deadline_s: float) -> None:
        replica = self.replicas.get(machine)
        if replica is not None:
            self.drained.append(machine)
            left_s = self.now_s + min(deadline_s, self.leaves_s)
            replica.left_s = min(left_s, replica.left_s or left_s)

    def look(self) -> None:
        """Replicas go with their pods, and drained ones with their work."""
        running = {
            pod["metadata"]["name"]
            for pod in self.cluster.store.list(At("", "v1", "pods"))[0]
            if not pod["metadata"].get("deletionTimestamp") and _ready(pod)
        }
        for name, replica in list(self.replicas.items()):
            left = replica.left_s is not None and replica.left_s <= self.now_s
            if name not in running or left:
                del self.replicas[name]

    def answering(self) -> list[str]:
        """Pods whose replica takes work now."""
        self.look()
        return [
            name
            for name, replica in self.replicas.items()
            if replica.ready_s <= self.now_s and replica.left_s is None
        ]

    async def _metrics(self, _: Request) -> Response:
        self.began_s = self.now_s if self.began_s is None else self.began_s
        tokens = self.tokens_per_s * (self.now_s - self.began_s)
        lines = [
            "sanderling_service_status_up 1",
            "sanderling_queued_tokens 0",
            f'vllm:prompt_tokens_total{{model_name="m"}} {tokens / 2}',
            f'vllm:generation_tokens_total{{model_name="m"}} {tokens / 2}',
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _status(self, _: Request) -> Response:
        self.look()
        return JSONResponse({"replicas": [self._entry(n, r) for n, r in self.replicas.items()]})

    def _entry(self, name: str, replica: Replica) -> dict[str, Any]:
        ready = replica.ready_s <= self.now_s
        phase = "draining" if replica.left_s is not None else "ready" if ready else "starting"
        stats = {**STATS, "running": 1, "held": 0} if ready else None
        state = None if stats is None else {"stats": stats}
        name = f"{replica.role}-1.{name}"
        return {"replica_id": name, "role": replica.role, "phase": phase, "state": state}


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status)


def _ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
