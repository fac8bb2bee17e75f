"""Settings of the provider whose machines are the worker pods of a RayService."""

from pydantic import Field

from cluster.settings.section import Seconds, Section


class KubernetesSettings(Section):
    """Where the service runs, and how the controller knows that it is the only one."""

    kubeconfig: str = Field(
        "", description="File that says where the API server is. Empty: the pod's own account."
    )
    namespace: str = Field("", description="Of the RayService. Empty: the pod's own, or default.")
    service: str = Field("sanderling-serve", min_length=1, description="Name of the RayService.")
    lease: str = Field(
        "sanderling-controller",
        min_length=1,
        description="Lease that the leading controller holds; the ledger of machines is the "
        "ConfigMap of this name.",
    )
    lease_s: Seconds = Field(
        15.0, description="A leader that is not heard of for so long is followed by another."
    )
    notice_s: Seconds = Field(
        120.0, description="What a notice gives that says no time of its own."
    )
