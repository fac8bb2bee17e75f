"""The objects of the double: versions, conflicts, status apart, field managers, the log of changes.

One lock for all of it; what is handed out is a copy.
"""

import base64
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.kubernetes_double.kinds import (
    BUILT_IN,
    MONITORING,
    ApiError,
    GroupVersion,
    Kind,
    api_version,
    no_resource,
    not_found,
    qualified,
)
from tests.kubernetes_double.patches import Path, managed_fields, merged, owned, without
from tests.kubernetes_double.schema import Structural

Body = dict[str, Any]
Key = tuple[str, str, str | None, str]  # group, resource, namespace, name
KEPT = ("uid", "creationTimestamp", "name", "namespace", "generation", "deletionTimestamp")
GUARDED = ("leases",)  # built in, and cannot be replaced without a resourceVersion


def copied(body: Body) -> Body:
    """A copy of plain values, all the way down; several times as fast as copy.deepcopy."""
    return pickle.loads(pickle.dumps(body, pickle.HIGHEST_PROTOCOL))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class At:
    """Where an object, or a collection, is. sub: subresource."""

    group: str
    version: str
    resource: str
    namespace: str | None = None
    name: str = ""
    sub: str = ""


@dataclass(frozen=True)
class Change:
    """One line of the log. old: the object before, None where there was none."""

    version: int
    type: str
    key: Key
    new: Body
    old: Body | None


@dataclass(frozen=True)
class How:
    """What a request says beside its object."""

    manager: str = "unknown"
    dry: bool = False
    force: bool = False
    grace_s: int | None = None
    orphan: bool = False
    uid: str | None = None
    resource_version: str | None = None


ANYHOW = How()


class Store:
    """now_s: seconds since 1970 that objects are stamped with. graceful: a pod on a node that is
    deleted stays, with its deletionTimestamp, until somebody deletes it with grace 0 (a kubelet
    does)."""

    def __init__(self, now_s: Callable[[], float] = time.time, *, graceful: bool = False) -> None:
        self.now_s, self.graceful = now_s, graceful
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.version = self.floor = 100
        self.log: list[Change] = []
        self.objects: dict[Key, Body] = {}
        self.api: dict[GroupVersion, dict[str, Kind]] = {
            group: dict(kinds) for group, kinds in {**BUILT_IN, **MONITORING}.items()
        }
        self._schemas: dict[tuple[str, str, str], Structural] = {}
        self._owners: dict[Key, dict[Path, str]] = {}
        self._applied: dict[Key, set[str]] = {}
        for name in ("default", "kube-system", "kube-public"):
            self.create(At("", "v1", "namespaces"), {"metadata": {"name": name}})

    def stamp(self, in_s: float = 0.0) -> str:
        """Now, or a little later, as Kubernetes writes it: to the second."""
        now = datetime.fromtimestamp(self.now_s() + in_s, UTC)
        return now.strftime("%Y-%m-%dT%H:%M:%SZ")

    def kind(self, at: At) -> Kind:
        """404 where there is no such resource."""
        try:
            return self.api[at.group, at.version][at.resource]
        except KeyError:
            raise no_resource() from None

    def key(self, at: At, name: str = "") -> Key:
        """Where the object is kept, whatever version it is asked for in."""
        namespace = at.namespace if self.kind(at).namespaced else None
        return at.group, at.resource, namespace, name or at.name

    def has_schema(self, at: At) -> bool:
        """Whether it is a custom resource."""
        return (at.group, at.version, at.resource) in self._schemas

    def get(self, at: At) -> Body:
        """A copy of the object."""
        with self.lock:
            found = self.objects.get(self.key(at))
            if found is None:
                raise not_found(at.resource, at.group, at.name)
            return {**copied(found), "apiVersion": api_version(at.group, at.version)}

    def list(self, at: At, fits: Callable[[Body], bool] = lambda _: True) -> tuple[list[Body], int]:
        """Copies in the order of their names, and the version they are of."""
        with self.lock:
            found = [
                copied(body)
                for key, body in sorted(self.objects.items(), key=lambda item: str(item[0]))
                if self.within(key, at) and fits(body)
            ]
            return found, self.version

    @staticmethod
    def within(key: Key, at: At) -> bool:
        """Whether an object is in a collection."""
        return key[:2] == (at.group, at.resource) and at.namespace in (None, key[2])

    def create(self, at: At, body: Body, how: How = ANYHOW) -> Body:
        """409 where there is one of that name."""
        with self.lock:
            kind, body = self.kind(at), copied(body)
            name = self._named(at, kind, body)
            key = self.key(at, name)
            if key in self.objects:
                said = f'{qualified(at.resource, at.group)} "{name}" already exists'
                raise ApiError(409, "AlreadyExists", said, {"name": name, "kind": at.resource})
            body = self._admitted(at, body)
            body |= {"apiVersion": api_version(at.group, at.version), "kind": kind.kind}
            if at.group and "status" in kind.subresources:
                body.pop("status", None)
            body["metadata"] |= {
                "uid": str(uuid.uuid4()),
                "creationTimestamp": self.stamp(),
                "generation": 1,
            }
            self._complete(at, body)
            if how.dry:
                body["metadata"]["resourceVersion"] = ""
                return body
            self._owners[key] = dict.fromkeys(owned(body), how.manager)
            return self._put(key, body, None, "ADDED")

    def update(
        self, at: At, change: Callable[[Body], Body], how: How = ANYHOW, *, applying: bool = False
    ) -> Body:
        """The object as `change` makes it. 409 where it names a resourceVersion that is past."""
        with self.lock:
            old, key = self.get(at), self.key(at)
            new = change(copied(old))
            self._refuse_past(at, old, new)
            new = self._one_side(at, old, new)
            new = self._admitted(at, new)
            new |= {"apiVersion": old["apiVersion"], "kind": old["kind"]}
            self._complete(at, new)
            if new == old:
                return old
            if new.get("spec") != old.get("spec"):
                new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
            if how.dry:
                return new
            ending = new["metadata"].get("deletionTimestamp") and at.resource != "pods"
            if ending and not new["metadata"].get("finalizers"):
                return self._drop(key, new)
            if not applying:
                self._own(key, old, new, how.manager)
            return self._put(key, new, old, "MODIFIED")

    def apply(self, at: At, body: Body, how: How) -> tuple[Body, bool]:
        """Server-side apply. 409 where another manager owns a field with another value. Returns
        the object, and whether it was made now."""
        with self.lock:
            key, mine = self.key(at), owned(body)
            if key not in self.objects:
                body.setdefault("metadata", {})["name"] = at.name
                made = self.create(at, body, how)
                self._applied.setdefault(key, set()).add(how.manager)
                return made, True
            owners, current = self._owners.setdefault(key, {}), owned(self.objects[key])
            if not how.force:
                self._refuse_conflicts(owners, current, mine, how.manager)
            gone = [path for path, who in owners.items() if who == how.manager and path not in mine]
            done = self.update(at, lambda old: without(merged(old, body), gone), how, applying=True)
            if how.dry:
                return done, False
            for path in gone:
                owners.pop(path)
            owners.update(dict.fromkeys(mine, how.manager))
            self._applied.setdefault(key, set()).add(how.manager)
            self._manage(key, self.objects[key])
            return copied(self.objects[key]), False

    def delete(self, at: At, how: How = ANYHOW) -> Body:
        """Finalizers, and a pod's grace where there is a kubelet, keep the object for a while."""
        with self.lock:
            body, key = self.get(at), self.key(at)
            self._refuse_other(at, body, how)
            if how.dry:
                return body
            metadata = body["metadata"]
            stays = at.resource == "pods" and self._dies_slowly(body, how)
            if metadata.get("finalizers") or stays:
                if not metadata.get("deletionTimestamp"):
                    grace_s = _grace_s(body, how) if stays else 0
                    metadata["deletionTimestamp"] = self.stamp(grace_s)
                    metadata["deletionGracePeriodSeconds"] = grace_s
                    return self._put(key, body, self.objects[key], "MODIFIED")
                return body
            dropped = self._drop(key, body)
            if at.resource == "namespaces":
                for other in [k for k in self.objects if k[2] == at.name]:
                    self._drop(other, self.objects[other])
            if not how.orphan:
                self._collect(metadata["uid"])
            return dropped

    def compact(self) -> None:
        """Forget what was: watches from before now are told 410, as after etcd's compaction."""
        with self.changed:
            self.version += 1
            self.floor = self.version
            self.log.clear()
            self.changed.notify_all()

    def _named(self, at: At, kind: Kind, body: Body) -> str:
        metadata = body.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        if not metadata.get("name"):
            raise ApiError(422, "Invalid", "metadata.name: name or generateName is required")
        if kind.namespaced:
            if metadata.get("namespace") not in (None, "", at.namespace):
                said = "the namespace of the object does not match the namespace of the request"
                raise ApiError(400, "BadRequest", said)
            metadata["namespace"] = at.namespace
            if ("", "namespaces", None, at.namespace) not in self.objects:
                raise not_found("namespaces", "", str(at.namespace))
        return str(metadata["name"])

    def _admitted(self, at: At, body: Body) -> Body:
        schema = self._schemas.get((at.group, at.version, at.resource))
        if schema is None:
            return body
        admitted, wrong = schema.admit(body)
        if wrong:
            name = f'{self.kind(at).kind}.{at.group} "{body["metadata"].get("name")}"'
            raise ApiError(422, "Invalid", f"{name} is invalid: {'; '.join(wrong)}")
        return admitted

    def _complete(self, at: At, body: Body) -> None:
        """What the server adds to some kinds."""
        if at.resource == "namespaces":
            body.setdefault("status", {"phase": "Active"})
            labels = body["metadata"].setdefault("labels", {})
            labels["kubernetes.io/metadata.name"] = body["metadata"]["name"]
        elif at.resource == "secrets":
            for key, text in (body.pop("stringData", None) or {}).items():
                body.setdefault("data", {})[key] = base64.b64encode(text.encode()).decode()
            body.setdefault("type", "Opaque")
        elif at.resource == "pods":
            body.setdefault("status", {}).setdefault("phase", "Pending")
        elif at.resource == "services":
            if body.get("spec", {}).get("type") != "ExternalName":
                address = f"10.96.{self.version // 250 % 250}.{self.version % 250 + 1}"
                body.setdefault("spec", {}).setdefault("clusterIP", address)
        elif at.resource == "customresourcedefinitions":
            self._establish(body)

    def _establish(self, body: Body) -> None:
        spec = body["spec"]
        group, names = spec["group"], spec["names"]
        for version in spec["versions"]:
            if not version.get("served"):
                continue
            kinds = self.api.setdefault((group, version["name"]), {})
            kinds[names["plural"]] = Kind(
                names["kind"],
                spec["scope"] == "Namespaced",
                tuple(version.get("subresources") or ()),
                tuple(names.get("shortNames") or ()),
            )
            open_api = (version.get("schema") or {}).get("openAPIV3Schema")
            if open_api:
                place = (group, version["name"], names["plural"])
                self._schemas[place] = Structural(open_api)
        stored = [version["name"] for version in spec["versions"] if version.get("storage")]
        conditions = [
            {"type": each, "status": "True", "reason": "Known", "message": ""}
            for each in ("NamesAccepted", "Established")
        ]
        body["status"] = {
            "acceptedNames": names,
            "storedVersions": stored,
            "conditions": conditions,
        }

    def _refuse_past(self, at: At, old: Body, new: Body) -> None:
        named = new.get("metadata", {}).get("resourceVersion")
        where = f'{qualified(at.resource, at.group)} "{at.name}"'
        if not named and (self.has_schema(at) or at.resource in GUARDED):
            said = "metadata.resourceVersion: Invalid value: 0: must be specified for an update"
            raise ApiError(422, "Invalid", f"{where} is invalid: {said}")
        if named and named != old["metadata"]["resourceVersion"]:
            said = (
                f"Operation cannot be fulfilled on {where}: the object has been modified; please "
                "apply your changes to the latest version and try again"
            )
            raise ApiError(409, "Conflict", said, {"name": at.name, "kind": at.resource})

    def _one_side(self, at: At, old: Body, new: Body) -> Body:
        """Either the status or all else, where the two are apart."""
        apart = "status" in self.kind(at).subresources
        if at.sub == "status":
            status = {"status": new["status"]} if new.get("status") is not None else {}
            return {**copied(old), **status}
        for key in KEPT:
            if key in old["metadata"]:
                new["metadata"][key] = old["metadata"][key]
        if apart:
            new.pop("status", None)
            if "status" in old:
                new["status"] = old["status"]
        return new

    def _refuse_other(self, at: At, body: Body, how: How) -> None:
        """Preconditions of a delete."""
        metadata = body["metadata"]
        wanted = {"uid": how.uid, "resourceVersion": how.resource_version}
        for name, value in wanted.items():
            if value is not None and metadata[name] != value:
                said = f"Precondition failed: {name} in precondition: {value}, in object meta: "
                raise ApiError(409, "Conflict", said + str(metadata[name]))

    def _refuse_conflicts(
        self, owners: Mapping[Path, str], current: dict[Path, str], mine: dict[Path, str], me: str
    ) -> None:
        causes = []
        for path, value in mine.items():
            other = owners.get(path)
            if other is not None and other != me and current.get(path) != value:
                field = "." + ".".join(path)
                about = {"message": f'conflict with "{other}"', "field": field}
                causes.append({"reason": "FieldManagerConflict", **about})
        if causes:
            many = f"{len(causes)} conflict{'s' * (len(causes) > 1)}"
            first = f"{causes[0]['message']}: {causes[0]['field']}"
            said = f"Apply failed with {many}: {first}"
            raise ApiError(409, "Conflict", said, {"causes": causes})

    def _own(self, key: Key, old: Body, new: Body, manager: str) -> None:
        before, after = owned(old), owned(new)
        owners = self._owners.setdefault(key, {})
        for path in [path for path in owners if path not in after]:
            owners.pop(path)
        owners.update({p: manager for p, value in after.items() if before.get(p) != value})

    def _manage(self, key: Key, body: Body) -> None:
        body["metadata"]["managedFields"] = managed_fields(
            self._owners.get(key, {}),
            body["apiVersion"],
            self.stamp(),
            self._applied.get(key, set()),
        )

    def _dies_slowly(self, body: Body, how: How) -> bool:
        bound = bool(body.get("spec", {}).get("nodeName"))
        return self.graceful and bound and _grace_s(body, how) > 0

    def _put(self, key: Key, body: Body, old: Body | None, what: str) -> Body:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self._manage(key, body)
        self.objects[key] = body
        self._tell(Change(self.version, what, key, copied(body), old))
        return copied(body)

    def _drop(self, key: Key, body: Body) -> Body:
        old = self.objects.pop(key)
        self._owners.pop(key, None)
        self._applied.pop(key, None)
        self.version += 1
        body = copied(body)
        body["metadata"]["resourceVersion"] = str(self.version)
        self._tell(Change(self.version, "DELETED", key, body, old))
        return copied(body)

    def _tell(self, change: Change) -> None:
        self.log.append(change)
        self.changed.notify_all()

    def collect_orphans(self) -> None:
        """What names owners of which none is there, as when one went while it was being made."""
        with self.lock:
            there = {body["metadata"]["uid"] for body in self.objects.values()}
            for key, body in list(self.objects.items()):
                owners = body["metadata"].get("ownerReferences") or ()
                if owners and not any(owner.get("uid") in there for owner in owners):
                    self._drop(key, body)

    def _collect(self, uid: str) -> None:
        """What was owned by an object that is gone."""
        for key in list(self.objects):
            body = self.objects.get(key)
            if body is None:
                continue
            owners = body["metadata"].get("ownerReferences") or ()
            if any(owner.get("uid") == uid for owner in owners):
                self._drop(key, body)
                self._collect(body["metadata"]["uid"])


def _grace_s(body: Body, how: How) -> int:
    given = body.get("spec", {}).get("terminationGracePeriodSeconds", 30)
    return int(given if how.grace_s is None else how.grace_s)
