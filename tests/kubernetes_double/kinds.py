"""What the double knows of Kubernetes' own resources, and how it says no."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One resource of an API group. subresources: those that can be asked for by path."""

    kind: str
    namespaced: bool = True
    subresources: tuple[str, ...] = ()
    short: tuple[str, ...] = ()


GroupVersion = tuple[str, str]  # ("", "v1"), ("apps", "v1")
STATUS = ("status",)
SCALED = ("status", "scale")

BUILT_IN: Mapping[GroupVersion, Mapping[str, Kind]] = {
    ("", "v1"): {
        "namespaces": Kind("Namespace", False, ("status", "finalize"), ("ns",)),
        "nodes": Kind("Node", False, STATUS, ("no",)),
        "pods": Kind("Pod", True, ("status", "eviction", "log", "binding"), ("po",)),
        "services": Kind("Service", True, STATUS, ("svc",)),
        "secrets": Kind("Secret"),
        "configmaps": Kind("ConfigMap", short=("cm",)),
        "serviceaccounts": Kind("ServiceAccount", True, ("token",), ("sa",)),
        "events": Kind("Event", short=("ev",)),
        "endpoints": Kind("Endpoints"),
        "persistentvolumeclaims": Kind("PersistentVolumeClaim", True, STATUS, ("pvc",)),
        "persistentvolumes": Kind("PersistentVolume", False, STATUS, ("pv",)),
        "replicationcontrollers": Kind("ReplicationController", True, SCALED, ("rc",)),
        "resourcequotas": Kind("ResourceQuota", True, STATUS),
        "limitranges": Kind("LimitRange"),
    },
    ("apps", "v1"): {
        "deployments": Kind("Deployment", True, SCALED, ("deploy",)),
        "statefulsets": Kind("StatefulSet", True, SCALED, ("sts",)),
        "daemonsets": Kind("DaemonSet", True, STATUS, ("ds",)),
        "replicasets": Kind("ReplicaSet", True, SCALED, ("rs",)),
    },
    ("batch", "v1"): {
        "jobs": Kind("Job", True, STATUS),
        "cronjobs": Kind("CronJob", True, STATUS),
    },
    ("policy", "v1"): {"poddisruptionbudgets": Kind("PodDisruptionBudget", True, STATUS, ("pdb",))},
    ("autoscaling", "v2"): {
        "horizontalpodautoscalers": Kind("HorizontalPodAutoscaler", True, STATUS, ("hpa",))
    },
    ("networking.k8s.io", "v1"): {
        "networkpolicies": Kind("NetworkPolicy", short=("netpol",)),
        "ingresses": Kind("Ingress", True, STATUS),
        "ingressclasses": Kind("IngressClass", False),
    },
    ("rbac.authorization.k8s.io", "v1"): {
        "roles": Kind("Role"),
        "rolebindings": Kind("RoleBinding"),
        "clusterroles": Kind("ClusterRole", False),
        "clusterrolebindings": Kind("ClusterRoleBinding", False),
    },
    ("scheduling.k8s.io", "v1"): {"priorityclasses": Kind("PriorityClass", False)},
    ("storage.k8s.io", "v1"): {"storageclasses": Kind("StorageClass", False)},
    ("coordination.k8s.io", "v1"): {"leases": Kind("Lease")},
    ("apiextensions.k8s.io", "v1"): {
        "customresourcedefinitions": Kind("CustomResourceDefinition", False, STATUS, ("crd",))
    },
    ("authorization.k8s.io", "v1"): {
        "selfsubjectaccessreviews": Kind("SelfSubjectAccessReview", False),
        "subjectaccessreviews": Kind("SubjectAccessReview", False),
    },
    ("admissionregistration.k8s.io", "v1"): {
        "validatingwebhookconfigurations": Kind("ValidatingWebhookConfiguration", False),
        "mutatingwebhookconfigurations": Kind("MutatingWebhookConfiguration", False),
    },
}

# Prometheus' operator, whose resources a chart may make: known without a schema.
MONITORING: Mapping[GroupVersion, Mapping[str, Kind]] = {
    ("monitoring.coreos.com", "v1"): {
        "servicemonitors": Kind("ServiceMonitor"),
        "podmonitors": Kind("PodMonitor"),
        "prometheusrules": Kind("PrometheusRule"),
    }
}


def api_version(group: str, version: str) -> str:
    """("apps", "v1") -> "apps/v1"; ("", "v1") -> "v1"."""
    return f"{group}/{version}" if group else version


def qualified(resource: str, group: str) -> str:
    """ "pods", "rayclusters.ray.io": as errors name resources."""
    return f"{resource}.{group}" if group else resource


@dataclass
class ApiError(Exception):
    """An answer that is no. code: HTTP's; reason: Kubernetes' machine-readable word."""

    code: int
    reason: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    retry_after_s: int | None = None

    def status(self) -> dict[str, Any]:
        """The body of the answer."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }


def not_found(resource: str, group: str, name: str) -> ApiError:
    """There is no such object."""
    details = {"name": name, "group": group, "kind": resource}
    return ApiError(404, "NotFound", f'{qualified(resource, group)} "{name}" not found', details)


def no_resource() -> ApiError:
    """The server has no such path."""
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def success() -> dict[str, Any]:
    """The answer to what leaves nothing to show."""
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
