"""Roles made of the controller's own list of rights, as the chart has them."""

from typing import Any

from autoscale.providers.kubernetes.rights import RIGHTS, Right
from cluster.settings.kubernetes import KubernetesSettings

GROUP = "rbac.authorization.k8s.io"


def roles(namespace: str, user: str) -> list[dict[str, Any]]:
    """A Role, a ClusterRole, and what binds them to a service account's user."""
    account = user.rpartition(":")[2]
    made = []
    for kind, inside in (("Role", True), ("ClusterRole", False)):
        rules = [rule for name, right in RIGHTS.items() for rule in _rules(name, right, inside)]
        metadata = {"name": "controller", **({"namespace": namespace} if inside else {})}
        about = {"apiVersion": f"{GROUP}/v1", "metadata": metadata}
        made.append({**about, "kind": kind, "rules": rules})
        subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
        reference = {"kind": kind, "name": "controller", "apiGroup": GROUP}
        made.append(
            {**about, "kind": f"{kind}Binding", "roleRef": reference, "subjects": [subject]}
        )
    return made


def _rules(name: str, right: Right, inside: bool) -> list[dict[str, Any]]:
    if right.namespaced != inside:
        return []
    rule = {"apiGroups": [right.group], "resources": [name], "verbs": list(right.verbs)}
    if not right.own:
        return [rule]
    mine = [verb for verb in right.verbs if verb != "create"]
    named = {**rule, "verbs": mine, "resourceNames": [KubernetesSettings().lease]}
    return [named, {**rule, "verbs": ["create"]}]
