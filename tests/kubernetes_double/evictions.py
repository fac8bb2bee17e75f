"""pods/eviction: a pod goes only if every disruption budget over it lets it."""

from typing import Any

from tests.kubernetes_double.kinds import ApiError
from tests.kubernetes_double.selectors import selector_matches
from tests.kubernetes_double.store import At, How, Store

Body = dict[str, Any]


def evict(store: Store, at: At, how: How) -> None:
    """429 where a budget would be broken, 500 where two budgets cover the pod."""
    with store.lock:
        place = At("", "v1", "pods", at.namespace, at.name)
        pod = store.get(place)
        if pod["status"].get("phase") != "Pending" and not pod["metadata"].get("deletionTimestamp"):
            _refuse(store, pod)
        store.delete(place, how)


def _refuse(store: Store, pod: Body) -> None:
    over = [budget for budget in _budgets(store, pod) if _covers(budget, pod)]
    if len(over) > 1:
        said = "This pod has more than one PodDisruptionBudget, which the eviction subresource "
        raise ApiError(500, "InternalError", said + "does not support.")
    if over and healthy(pod) and allowed(store, over[0]) < 1:
        name = over[0]["metadata"]["name"]
        cause = {
            "reason": "DisruptionBudget",
            "message": f"The disruption budget {name} needs {needed(store, over[0])} healthy pods "
            f"and has {sum(map(healthy, _peers(store, over[0])))} currently",
        }
        said = "Cannot evict pod as it would violate the pod's disruption budget."
        raise ApiError(429, "TooManyRequests", said, {"causes": [cause]}, retry_after_s=10)


def allowed(store: Store, budget: Body) -> int:
    """How many healthy pods may go now."""
    return sum(map(healthy, _peers(store, budget))) - needed(store, budget)


def needed(store: Store, budget: Body) -> int:
    """How many healthy pods have to stay."""
    expected = len(_peers(store, budget))
    least, most = (budget["spec"].get(key) for key in ("minAvailable", "maxUnavailable"))
    if least is not None:
        return _count(least, expected)
    return expected - _count(1 if most is None else most, expected)


def healthy(pod: Body) -> bool:
    """Ready, and not on its way out."""
    conditions = pod.get("status", {}).get("conditions") or ()
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and not pod["metadata"].get("deletionTimestamp")


def _count(given: int | str, of: int) -> int:
    """A number, or a share of pods, rounded up."""
    return -(-int(given[:-1]) * of // 100) if isinstance(given, str) else given


def _budgets(store: Store, pod: Body) -> list[Body]:
    namespace = pod["metadata"]["namespace"]
    return store.list(At("policy", "v1", "poddisruptionbudgets", namespace))[0]


def _covers(budget: Body, pod: Body) -> bool:
    labels = pod["metadata"].get("labels") or {}
    return selector_matches(budget["spec"].get("selector"), labels)


def _peers(store: Store, budget: Body) -> list[Body]:
    pods = store.list(At("", "v1", "pods", budget["metadata"]["namespace"]))[0]
    return [pod for pod in pods if _covers(budget, pod)]
