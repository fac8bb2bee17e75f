"""Parts of the Kubernetes provider: notices, marks on nodes, the lease, watches, the ledger."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoscale.catalog.offer import Offer
from autoscale.providers.kubernetes import nodes
from autoscale.providers.kubernetes.api import Api, ApiFailed, Conflict, connect
from autoscale.providers.kubernetes.lease import Election
from autoscale.providers.kubernetes.ledger import GONE, Entry, Ledger, read, written
from autoscale.providers.kubernetes.notices import doomed_s, seconds, stamp
from autoscale.providers.kubernetes.settle import Seen, settled, wanted
from autoscale.providers.kubernetes.view import Group, Pod, groups
from autoscale.providers.kubernetes.watch import Watch
from cluster.clock import VirtualClock
from cluster.settings.kubernetes import KubernetesSettings
from tests.kubernetes_double.server import Double
from tests.kubernetes_double.service import group, ray_service
from tests.kubernetes_double.store import At

NOW_S = 1_800_000_000.0


@pytest.fixture
def double() -> Iterator[Double]:
    with Double() as made:
        yield made


def api(double: Double, folder: Path) -> Api:
    config = double.kubeconfig(folder / "config")
    return connect(KubernetesSettings(kubeconfig=str(config), namespace="default"))


# Marks by the documents of those who make them: node, seconds from NOW_S to the loss.
SINCE = stamp(NOW_S - 10)
MARKED: dict[str, tuple[dict[str, Any], float | None]] = {
    "nothing": ({}, None),
    "somebody's taint": ({"spec": {"taints": [{"key": "nvidia.com/gpu"}]}}, None),
    "AWS, since when": (
        {
            "spec": {
                "taints": [{"key": "aws-node-termination-handler/spot-itn", "timeAdded": SINCE}]
            }
        },
        110.0,
    ),
    "AWS, seen now": (
        {"spec": {"taints": [{"key": "aws-node-termination-handler/spot-itn"}]}},
        120.0,
    ),
    "Google": (
        {"spec": {"taints": [{"key": "cloud.google.com/impending-node-termination"}]}},
        30.0,
    ),
    "the node autoscaler": (
        {"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}},
        77.0,
    ),
    "Azure": (
        {
            "status": {
                "conditions": [
                    {"type": "PreemptScheduled", "status": "True", "lastTransitionTime": SINCE}
                ]
            }
        },
        20.0,
    ),
    "Azure, over": (
        {"status": {"conditions": [{"type": "PreemptScheduled", "status": "False"}]}},
        None,
    ),
    "by hand": ({"metadata": {"labels": {"sanderling/doomed": "true"}}}, 77.0),
    "two, the first counts": (
        {
            "spec": {"taints": [{"key": "cloud.google.com/impending-node-termination"}]},
            "metadata": {"labels": {"sanderling/doomed": "true"}},
        },
        30.0,
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_who_marks_a_node_is_understood(name: str):
    node, left_s = MARKED[name]
    found = doomed_s({"metadata": {}, **node}, NOW_S, 77.0)
    assert found == (None if left_s is None else pytest.approx(NOW_S + left_s))


def test_times_are_read_with_and_without_a_fraction():
    assert seconds("2027-01-15T08:00:00Z") == NOW_S == seconds("2027-01-15T09:00:00+01:00")
    assert seconds(stamp(NOW_S + 0.25)) == NOW_S + 0.25 and seconds(None) is None


def test_taints_of_others_outlive_ours(double: Double, tmp_path: Path):
    """Read, change, write back under the version that was read; a write between is seen."""
    made = api(double, tmp_path)
    other = {"key": "other", "effect": "NoSchedule"}
    double.add({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}, "spec": {}})
    at = At("", "v1", "nodes", None, "n")
    reading, once = made.get, iter([True])

    def interrupted(resource: str, name: str) -> dict[str, Any]:
        found = reading(resource, name)
        if next(once, False):
            double.store.update(at, lambda node: {**node, "spec": {"taints": [other]}})
        return found

    made.get = interrupted  # type: ignore[method-assign]
    assert nodes.close(made, "n") and not nodes.close(made, "n") and not nodes.close(made, "none")
    spec = double.store.get(at)["spec"]
    assert spec["unschedulable"] is True
    assert [taint["key"] for taint in spec["taints"]] == ["other", nodes.NOTICE]
    assert [code for a, code in double.attempts if a.verb == "patch"] == [409, 200]


def test_of_two_only_one_leads_and_the_other_follows_when_it_is_silent(
    double: Double, tmp_path: Path
):
    async def work() -> None:
        clock = VirtualClock(start_s=50.0)
        one, two = (
            Election(api(double, tmp_path), "lease", name, 15.0, clock, lambda: NOW_S)
            for name in ("one", "two")
        )
        assert await one.once() and not await two.once()
        for _ in range(10):
            await clock.advance(5.0)
            assert await one.once() and not await two.once()
        await clock.advance(9.0)
        assert one.leads(), "for two thirds of the lease"
        await clock.advance(2.0)
        assert not one.leads() and not await two.once(), "nobody, until the lease is over"
        await clock.advance(5.0)
        assert await two.once() and two.term == 1
        assert not await one.once() and not one.leads()
        await two.resign()
        assert not two.leads() and await one.once() and one.term == 2, "at once"

    asyncio.run(work())


def test_a_lease_that_cannot_be_renewed_is_given_up(double: Double, tmp_path: Path):
    async def work() -> None:
        clock = VirtualClock()
        one = Election(api(double, tmp_path), "lease", "one", 15.0, clock, lambda: NOW_S)
        assert await one.once()
        for kind in ("500", "no answer", "409"):
            double.faults.add(kind, "update", "leases")
        assert await one.once() and await one.once(), "one failure is none"
        assert not await one.once(), "somebody else wrote it"
        assert await one.once()
        double.faults.add("500", "get", "leases", times=9)
        await clock.advance(9.0)
        assert await one.once()
        await clock.advance(2.0)
        assert not await one.once()

    asyncio.run(work())


def _marked(double: Double, name: str) -> None:
    taint = {"key": "ToBeDeletedByClusterAutoscaler"}
    at = At("", "v1", "nodes", None, name)
    double.store.update(at, lambda node: {**node, "spec": {"taints": [taint]}})


def test_a_watch_wakes_and_outlives_drops_compaction_and_silence(double: Double, tmp_path: Path):
    for name in "abc":
        double.add({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {}})
    woken = threading.Event()
    watch = Watch(api(double, tmp_path), "nodes", woken.set, pause_s=0.05, lasts_s=3)
    watch.start()
    try:
        until(lambda: any(a.verb == "watch" for a, _ in double.attempts))
        at = At("", "v1", "nodes", None, "a")
        double.store.update(
            at, lambda n: {**n, "metadata": {**n["metadata"], "labels": {"x": "y"}}}
        )
        assert not woken.wait(0.6), "a heartbeat wakes nobody"
        _marked(double, "a")
        assert woken.wait(10)
        woken.clear()
        double.faults.drop_watches()
        _marked(double, "b")
        assert woken.wait(10), "it goes on where it was"
        # Where it was may be told twice: the next wake may still be b's.
        lists, asked = watch.relisted, len(double.attempts)
        double.faults.drop_watches()
        double.store.compact()

        def anew() -> bool:
            verbs = [a.verb for a, _ in double.attempts[asked:]]
            return "list" in verbs and "watch" in verbs[verbs.index("list") :]

        assert until(anew) and watch.relisted == lists + 1, "410: anew"
        assert woken.is_set(), "and what was missed may matter"
        woken.clear()
        double.faults.frozen = True
        _marked(double, "c")
        assert not woken.wait(0.6), "a stale watch says nothing, and a listing would"
        double.faults.frozen = False
        assert woken.wait(10)
    finally:
        watch.close()
        double.faults.drop_watches()


def until(so: Any, within_s: float = 30.0) -> bool:
    end_s = time.monotonic() + within_s
    while not so():
        assert time.monotonic() < end_s, "it did not come"
        time.sleep(0.02)
    return True


OFFER = Offer("g", "a10g", 1, "r", "z", "spot", 0.2)
GROUP = Group(OFFER, "decode", 0, 0, (), False)


def pod(name: str, **more: Any) -> Pod:
    values = {"token": "", "machine": "", "node": "n", "ready_s": None, "ends_s": None}
    return Pod(name, "g", NOW_S, **{**values, "over": False, "refused": False, **more})


def seen(*pods: Pod, fresh: bool = False, cluster: str = "c", replicas: int = 0) -> Seen:
    return Seen(NOW_S, cluster, [replace(GROUP, replicas=replicas)], pods, {}, fresh)


def test_what_is_there_before_the_first_look_is_adopted():
    ledger = settled(Ledger(), seen(pod("a"), pod("b"), fresh=True, replicas=3))
    assert [entry.pod for entry in ledger.held("g")] == ["a", "b", ""]
    assert {entry.token.partition("/")[0] for entry in ledger.entries} == {"decode"}
    assert wanted(ledger, GROUP, [pod("a"), pod("b")]).replicas == 3


def test_a_lost_ledger_is_read_off_the_pods_and_strange_pods_are_ended():
    pods = [pod("a", token="decode/x/1"), pod("b")]
    ledger = settled(Ledger(), seen(*pods))
    assert [(e.token, e.pod) for e in ledger.entries] == [("decode/x/1", "a")]
    want = wanted(ledger, GROUP, pods)
    assert (want.replicas, want.delete) == (1, ("b",))


def test_launches_get_pods_in_their_order_and_a_lost_pod_is_not_replaced():
    asked = Ledger("c", (Entry("t1", "g", NOW_S), Entry("t2", "g", NOW_S)))
    both = settled(asked, seen(pod("a"), pod("b")))
    assert [e.pod for e in both.entries] == ["a", "b"]
    assert [e.kind for e in both.events] == ["launch_ok", "launch_ok"]
    lost = settled(both, seen(pod("b"), pod("new")))
    assert [e.gone_s is None for e in lost.entries] == [False, True]
    assert [(e.kind, e.value) for e in lost.events[2:]] == [("preempt", 1.0)]
    want = wanted(lost, GROUP, [pod("b"), pod("new")])
    assert (want.replicas, want.delete) == (1, ("new",))


def test_a_new_cluster_keeps_the_machines_and_changes_their_pods():
    old = Ledger("c", (Entry("t", "g", NOW_S, "a", placed=True, ready_s=NOW_S),))
    moved = settled(old, seen(pod("z", ready_s=NOW_S + 1), cluster="next"))
    [entry] = moved.entries
    assert (entry.pod, entry.gone_s, moved.cluster) == ("z", None, "next")
    assert [event.kind for event in moved.events] == ["launch_ok"], "nothing was lost"


def test_a_ledger_is_read_as_it_was_written_and_does_not_grow_for_ever():
    ledger = Ledger("c", (Entry("t", "g", NOW_S, "a", doomed_s=NOW_S),)).tell(NOW_S, "g", "held", 1)
    assert read(written(ledger), "it") == ledger
    with pytest.raises(ValueError, match="it holds no ledger"):
        read('{"entries": 3}', "it")
    gone = [Entry(f"t{n}", "g", NOW_S, gone_s=NOW_S - n) for n in range(GONE + 50)]
    many = Ledger("c", (*ledger.entries, *gone))
    for number in range(1000):
        many = many.tell(NOW_S + number, "g", "held", 1)
    kept = many.pruned(NOW_S)
    assert len(kept.entries) == GONE + 1 and kept.entries[0].token == "t"
    assert len(kept.events) + kept.dropped == 1000 and kept.events[-1].t_s == NOW_S + 999
    assert len(written(kept)) < 200_000, "a ConfigMap holds a megabyte"
    assert kept.pruned(NOW_S + 4000).entries == ledger.entries


def test_groups_are_offers_by_their_labels_and_a_wrong_one_is_named():
    specs = ray_service(group("g", "spot", 4, 0.2))["spec"]["rayClusterConfig"]
    [found] = groups({"spec": specs})
    assert (found.offer.name, found.offer.market, found.offer.quota) == ("g", "spot", 4)
    assert (found.offer.usd_per_h, found.offer.kind, found.role) == (0.2, "a10g", "decode")
    labels = specs["workerGroupSpecs"][0]["labels"]
    for name, value in {"sanderling/market": "sp0t", "sanderling/usd-per-h": "cheap"}.items():
        kept = labels[name]
        labels[name] = value
        with pytest.raises(ValueError, match=f"'g'.*{name}.*accepted"):
            groups({"spec": specs})
        labels[name] = kept


def test_what_the_server_says_is_told_apart(double: Double, tmp_path: Path):
    made = api(double, tmp_path)
    for kind, error, transient in (
        ("409", Conflict, False),
        ("410", ApiFailed, True),
        ("429", ApiFailed, True),
        ("500", ApiFailed, True),
        ("no answer", ApiFailed, True),
    ):
        double.faults.add(kind, "list", "pods")  # type: ignore[arg-type]
        with pytest.raises(error) as failed:
            made.list("pods")
        assert failed.value.transient is transient, kind
    assert made.list("pods")["items"] == []
    with pytest.raises(ValueError, match="autoscale.kubernetes.kubeconfig = '/none'"):
        connect(KubernetesSettings(kubeconfig="/none"))
