"""Named actors that outlive whoever started them: start, find, list, kill.

The controller starts replicas here, finds them again by name prefix after it crashed, and kills
those it no longer wants. All live in our namespace, named explicitly: code inside a Serve replica
runs in Serve's. Nothing here restarts a dead actor; replacing is the controller's decision.

What a caller sees of an actor that was killed with -9 (measured): the next item of a stream, and
any call in flight, raise ray.exceptions.ActorDiedError after 10-20 ms; later calls within 1 ms;
its name is free at once. An ActorUnavailableError means it may come back (restarts > 0 only).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.raylocal.session import NAMESPACE


@dataclass(frozen=True)
class Needs:
    """What an actor asks of a machine.

    cpus: CPUs reserved (fractions allowed). memory_bytes: memory reserved, 0 for none; neither is
    a limit. labels: node labels it must have. resources: custom resources.
    environment: variables of its process. They cost about 1 s at start (no idle worker can be
    taken), so thread counts are better set by the actor itself (torch.set_num_threads).
    concurrency: calls served at once (async methods) before further ones queue.
    """

    cpus: float = 0.0
    memory_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    concurrency: int = 1000


def start_named(
    cls: type, name: str, *args: Any, needs: Needs = Needs(), restarts: int = 0, **kwargs: Any
) -> Any:
    """Start `cls(*args, **kwargs)` as a detached actor `name`; returns its handle at once.

    It lives until killed or the cluster ends, whatever becomes of the caller. Its constructor runs
    later: the first call on the handle waits for it, forever if no machine meets `needs`.
    restarts: how often Ray restarts it after a crash, -1 for always (only the controller).
    ValueError if the name is taken.
    """
    import ray

    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": needs.cpus,
        "max_restarts": restarts,
        "max_concurrency": needs.concurrency,
    }
    if needs.memory_bytes:
        options["memory"] = needs.memory_bytes
    if needs.labels:
        options["label_selector"] = dict(needs.labels)
    if needs.resources:
        options["resources"] = dict(needs.resources)
    if needs.environment:
        options["runtime_env"] = {"env_vars": dict(needs.environment)}
    try:
        return ray.remote(cls).options(**options).remote(*args, **kwargs)
    except ray.exceptions.ActorAlreadyExistsError as error:
        raise ValueError(f"an actor named {name!r} already lives; names are unique") from error


def find(name: str) -> Any | None:
    """The handle of the living actor `name`, or None; says nothing about whether it answers."""
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def list_named(prefix: str = "") -> list[str]:
    """Names of our living actors (starting ones included) that begin with `prefix`, sorted."""
    import ray

    found = ray.util.list_named_actors(all_namespaces=True)
    names = (actor["name"] for actor in found if actor["namespace"] == NAMESPACE)
    return sorted(name for name in names if name.startswith(prefix))


def kill(name: str) -> bool:
    """End the actor `name` at once and for good (SIGKILL, no restart); False if none lives."""
    import ray

    handle = find(name)
    if handle is None:
        return False
    ray.kill(handle, no_restart=True)
    return True
