"""Who may do what, by the roles and bindings in the store; and which rules were never used."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.kubernetes_double.store import At, Store

Body = dict[str, Any]
ADMIN = "admin"
GROUP = "rbac.authorization.k8s.io"


@dataclass(frozen=True)
class Attempt:
    """One request, as the authorizer sees it. resource: with its subresource: "pods/eviction"."""

    user: str
    verb: str
    group: str
    resource: str
    namespace: str | None
    name: str = ""

    def line(self) -> str:
        """As a person would say it."""
        where = "the cluster" if self.namespace is None else self.namespace
        named = f" {self.name}" if self.name else ""
        resource = f"{self.resource}.{self.group}" if self.group else self.resource
        return f"{self.verb} {resource}{named} in {where}"


@dataclass(frozen=True)
class Granted:
    """One right of a rule that a user has: a single verb on a single resource."""

    role: str
    verb: str
    group: str
    resource: str
    names: tuple[str, ...]
    namespace: str | None  # None: everywhere

    def covers(self, attempt: Attempt) -> bool:
        """Whether the right is enough for it."""
        return (
            self.verb in ("*", attempt.verb)
            and self.group in ("*", attempt.group)
            and self.resource in ("*", attempt.resource)
            and (not self.names or attempt.name in self.names)
            and (self.namespace is None or self.namespace == attempt.namespace)
        )


def account(namespace: str, name: str) -> str:
    """A service account's user name."""
    return f"system:serviceaccount:{namespace}:{name}"


def granted(store: Store, user: str) -> list[Granted]:
    """Every right that bindings give a user."""
    rights: list[Granted] = []
    for resource in ("rolebindings", "clusterrolebindings"):
        for binding in store.list(At(GROUP, "v1", resource))[0]:
            if any(_is(subject, binding, user) for subject in binding.get("subjects") or ()):
                rights += _rights(store, binding)
    return rights


def allowed(store: Store, attempt: Attempt) -> bool:
    """Whether the user may. The admin may everything."""
    return attempt.user == ADMIN or any(
        right.covers(attempt) for right in granted(store, attempt.user)
    )


def unused(rights: Sequence[Granted], attempts: Sequence[Attempt]) -> list[Granted]:
    """Rights that no attempt needed."""
    return [right for right in rights if not any(right.covers(each) for each in attempts)]


def _is(subject: Body, binding: Body, user: str) -> bool:
    if subject["kind"] != "ServiceAccount":
        return bool(subject["kind"] == "User" and subject["name"] == user)
    own = binding["metadata"].get("namespace", "")
    return account(subject.get("namespace", own), subject["name"]) == user


def _rights(store: Store, binding: Body) -> Iterator[Granted]:
    namespace = binding["metadata"].get("namespace")
    reference = binding["roleRef"]
    plural = "clusterroles" if reference["kind"] == "ClusterRole" else "roles"
    where = None if plural == "clusterroles" else namespace
    key = (GROUP, plural, where, reference["name"])
    role = store.objects.get(key) or {}
    for rule in role.get("rules") or ():
        names = tuple(rule.get("resourceNames") or ())
        for verb in rule["verbs"]:
            for group in rule.get("apiGroups") or ():
                for resource in rule.get("resources") or ():
                    yield Granted(reference["name"], verb, group, resource, names, namespace)
