"""Local machines that are Ray nodes: replicas are placed on them by name, and go with them."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoscale.catalog.offer import Offer
from autoscale.providers.local.bodies import MARK_VARIABLE
from autoscale.providers.local.ledger import Ledger
from autoscale.providers.local.local import LocalProvider
from autoscale.providers.local.market import LocalMarket, Step
from autoscale.providers.local.raynodes import ray_bodies
from cluster.clock import WallClock
from cluster.raylocal.session import RaySession
from cluster.settings import Settings
from serve.host import end_controller, start_controller
from tests.live.service import wait_for
from tests.models.tiny import write_byte_level
from tests.prove.raynodes import RayNodes, ray_nodes

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(600)]

SPOT = Offer("spot-a", "t4", 2, "here", "a", "spot", 0.2, startup_s=1.0)
READY_S = 180.0


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    with ray_nodes({}) as found:
        yield found


def test_replicas_are_where_they_were_placed_and_go_with_their_machine(
    nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in nodes.environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings.model_validate(
        {
            "model": str(write_byte_level(tmp_path / "tiny.gguf")),
            "data_dir": str(tmp_path),
            "ray": {"address": nodes.address, "auth": "token"},
            "prefill": {"replicas": 0},
            "decode": {"cpus": 1.0, "threads": 1},
            "engine": {"kv_tokens": 1024},
        }
    )
    bodies = ray_bodies(tmp_path / "bodies", nodes.address, environment=nodes.environment)
    with RaySession(settings):
        market = LocalMarket((SPOT,), (), 1.0)
        provider = LocalProvider(Ledger(tmp_path / "market"), market, bodies, WallClock())
        controller = start_controller(settings, "raymachines")
        try:
            asyncio.run(_play(provider, controller))
        finally:
            end_controller(controller)
            provider.close()
    assert bodies.alive() == frozenset()


async def _play(provider: LocalProvider, controller: Any) -> None:
    import ray

    names = await two_machines(provider)
    offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    assert [r["accelerator:t4"] for r in offered if "accelerator:t4" in r] == [2.0, 2.0]

    def placed_on() -> list[str]:
        """Machines with a ready replica, by the controller's word, and of those the ones where
        such a process runs, by the machine's."""
        directory = ray.get(controller.watch.remote(0, 0.0))
        ready = [e.replica_id.partition(".")[2] for e in directory.ready("decode")]
        return [name for name in ready if "ray::DecodeActor" in titles(provider, name)]

    await controller.place.remote("decode", names, 0.0)
    wait_for(lambda: sorted(placed_on()) == sorted(names), "a replica on each", READY_S)
    begun_s = provider.clock.now_s() - provider.opened_s
    provider.market = replace(provider.market, steps=(Step(begun_s + 2.0, SPOT.name, 1),))
    wait_for(lambda: states(provider).count("gone") == 1, "the loss of one", 30)
    gone = next(m.id for m in await provider.machines() if m.state == "gone")
    await controller.leave.remote(gone, 0.0)
    left = [name for name in names if name != gone]
    wait_for(lambda: placed_on() == left, "the one that is left", READY_S)
    assert titles(provider, gone) == []


async def two_machines(provider: LocalProvider) -> list[str]:
    """Ask again for one that is gone: on a busy machine Ray gives up a node that starts slowly."""
    for token in "abcdefgh":
        there = [m.id for m in await provider.machines() if m.state != "gone"]
        if len(there) < 2:
            there.append((await provider.launch(SPOT, token)).id)
        if len(there) == 2:
            wait_for(lambda: "pending" not in states(provider), "what becomes of nodes", READY_S)
        if states(provider).count("running") == 2:
            return there
    raise AssertionError("Ray started no two nodes")


def states(provider: LocalProvider) -> list[str]:
    provider.advance()
    return [machine.state for machine in provider.ledger.machines.values()]


def titles(provider: LocalProvider, machine_id: str) -> list[str]:
    """What runs on a machine, as its processes call themselves; read from /proc."""
    folder = provider.bodies.folder.resolve()  # type: ignore[attr-defined]
    mark = f"{MARK_VARIABLE}={folder}/{machine_id}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().split(b"\0")[0].decode())
        except OSError:
            continue
    return found
