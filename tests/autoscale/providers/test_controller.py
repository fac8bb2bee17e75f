"""The controller end to end, in compressed time: a notice, a replacement first, a drain, an
eviction; and the same with one thing going wrong, each thing that can."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from autoscale.providers import controller as made
from autoscale.providers.kubernetes.provider import KubernetesProvider
from autoscale.providers.kubernetes.rights import RIGHTS
from autoscale.providers.kubernetes.watch import Watch
from tests.autoscale.providers.kubernetes_faults import FAULTS, NOTICE_S, TWO, Fault, nothing, play
from tests.autoscale.providers.rights import roles
from tests.autoscale.providers.stage import FLOOR, USER, Stage, stage
from tests.kubernetes_double.rbac import granted, unused
from tests.kubernetes_double.store import At

QUICK = ("none", "409 on every write")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAULTS]
)
def test_whatever_goes_wrong_it_converges(name: str, tmp_path: Path):
    outcome = asyncio.run(play(tmp_path, FAULTS[name]))
    assert outcome.wrong(FAULTS[name]) == []


def test_a_notice_is_followed_by_replacement_drain_eviction_and_end_in_this_order(tmp_path: Path):
    async def work() -> None:
        async with stage(tmp_path) as on:
            for role in roles("default", USER):
                on.double.add(role)
            on.double.enforce = True
            before = len(on.double.attempts)
            [doomed] = [name for name in on.existing() if "spot-a" in name]
            on.cluster.limit("spot-a", 2)  # of more the cloud says no
            on.cluster.limit("spot-b", 1)
            on.cluster.doom(f"node-of-{doomed}", NOTICE_S)
            order = []
            for _ in range(14):
                await on.step()
                marks = {
                    "cordoned": _cordoned(on, f"node-of-{doomed}"),
                    "replaced": len(set(on.served.answering()) - {doomed}) >= FLOOR,
                    "drained": doomed in on.served.drained,
                    "evicted": any(
                        (a.verb, a.resource, a.name) == ("create", "pods/eviction", doomed)
                        for a in on.double.of(USER)
                    ),
                    "gone": doomed not in on.existing(),
                }
                order += [mark for mark, so in marks.items() if so and mark not in order]
            assert order == ["cordoned", "replaced", "drained", "evicted", "gone"]
            _uses_all_of_its_rights(on, before)

    asyncio.run(work())


def _cordoned(on: Stage, node: str) -> bool:
    nodes = on.double.store.list(At("", "v1", "nodes"))[0]
    return all(n["spec"].get("unschedulable") for n in nodes if n["metadata"]["name"] == node)


def _uses_all_of_its_rights(on: Stage, before: int) -> None:
    """Nothing was refused, and nothing of the rules is unused. What the chosen way did not need is
    done here by the same code: a pod that finds no machine, and watches."""
    on.cluster.limit("on-demand", 0)
    on.cluster._make(*_spare(on))
    on.cluster.tick()
    provider = on.controllers[0].provider.inner
    assert isinstance(provider, KubernetesProvider)
    provider._lookout.look()
    for resource in ("nodes", "pods"):
        watch = Watch(on.api(), resource, lambda: None, lasts_s=1)
        watch._follow(watch._listed())
    refused = [a.line() for a, code in on.double.attempts[before:] if code == 403]
    assert refused == []
    rights = granted(on.double.store, USER)
    assert len(rights) == sum(len(right.verbs) for right in RIGHTS.values())
    assert unused(rights, on.double.of(USER)) == []


def _spare(on: Stage) -> tuple[Any, str, str, Any]:
    [cluster] = on.double.store.list(At("ray.io", "v1", "rayclusters"))[0]
    template = cluster["spec"]["workerGroupSpecs"][0]["template"]
    return cluster, "worker", "on-demand", template


@pytest.mark.slow
def test_two_that_both_believe_to_lead_buy_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without the lease the count of pods has to notice: it can fail."""
    monkeypatch.setattr("autoscale.providers.kubernetes.lease.Election.leads", lambda self: True)
    outcome = asyncio.run(play(tmp_path, Fault(nothing, TWO, strikes=False)))
    assert any("pods were made" in text for text in outcome.wrong(FAULTS["two controllers"]))


@pytest.mark.slow
def test_a_controller_that_does_not_look_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Notices that nobody reads: the machine is lost with what runs on it."""
    monkeypatch.setattr("autoscale.providers.kubernetes.look.doomed_s", lambda *_: None)
    outcome = asyncio.run(play(tmp_path, FAULTS["none"]))
    assert {"1 were lost", "0 notices were told"} <= set(outcome.wrong(FAULTS["none"]))


def test_one_that_does_not_lead_changes_nothing():
    class Followed:
        me, term = "one", 0

        def leads(self) -> bool:
            return False

    async def work() -> None:
        fenced = made.Fenced(None, Followed())  # type: ignore[arg-type]
        service = made.FencedService(None, Followed())  # type: ignore[arg-type]
        for call in (
            fenced.launch(None, "t"),  # type: ignore[arg-type]
            fenced.terminate("m"),
            fenced.machines(),
            fenced.events(0),
            service.drain("m", 1.0),
            service.set_replicas("decode", ()),
        ):
            with pytest.raises(made.NotLeading, match="one leads no more"):
                await call

    asyncio.run(work())


@pytest.mark.slow
def test_an_upgrade_brings_as_many_machines_as_there_are(tmp_path: Path):
    """KubeRay's new cluster begins with the template's numbers, and gets the live ones."""

    async def work() -> None:
        async with stage(tmp_path) as on:
            on.served.tokens_per_s = 350.0
            await on.steps(20, watched=False)
            grown = on.replicas()
            assert sum(grown.values()) > FLOOR + 1
            at = At("ray.io", "v1", "rayservices", "default", "sanderling-serve")

            def upgraded(body):
                specs = body["spec"]["rayClusterConfig"]["workerGroupSpecs"]
                for spec in specs:
                    spec["template"]["spec"]["containers"][0]["image"] = "sanderling:next"
                return body

            on.double.store.update(at, upgraded)
            old = set(on.existing())
            most = 0
            for _ in range(14):
                await on.step(watched=False)
                clusters = on.double.store.list(At("ray.io", "v1", "rayclusters"))[0]
                for body in clusters:
                    specs = body["spec"]["workerGroupSpecs"]
                    most = max(most, sum(spec["replicas"] for spec in specs))
            assert len(clusters) == 1 and not old & set(on.existing())
            assert on.replicas() == grown and on.orphans() == set()
            assert most == sum(grown.values()), "never more of one cluster than there were"

    asyncio.run(work())
