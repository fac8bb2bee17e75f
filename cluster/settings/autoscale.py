"""Settings of the control loop: when replicas come and go, and on what machines."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.settings.kubernetes import KubernetesSettings
from cluster.settings.section import Seconds, Section

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Dollars = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class RoleScale(Section):
    """Bounds of one role, and how fast one replica of it is."""

    floor: int = Field(0, ge=0, le=1024, description="Fewest replicas that are to answer.")
    cap: int = Field(8, ge=0, le=1024, description="Most machines at once; 0 turns the role off.")
    on_demand: int = Field(
        0, ge=0, le=1024, description="Of the floor, how many are always bought on demand."
    )
    tokens_per_s: float = Field(
        0.0,
        ge=0,
        le=1e9,
        allow_inf_nan=False,
        description="What one replica serves, by its profile; what is measured while work waits "
        "takes its place. 0: measured alone.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "RoleScale":
        if self.floor > self.cap:
            raise ValueError(
                f"floor = {self.floor} is above cap = {self.cap}; a floor up to the cap is accepted"
            )
        if self.on_demand > self.floor:
            raise ValueError(
                f"on_demand = {self.on_demand} is above floor = {self.floor}; up to the floor is "
                "accepted"
            )
        return self


class DecodeScale(RoleScale):
    """The role that owns a request's tokens."""

    floor: int = Field(1, ge=0, le=1024, description="Fewest replicas that are to answer.")
    cap: int = Field(8, ge=1, le=1024, description="Most machines at once.")


class AutoscaleSettings(Section):
    """The control loop that buys machines and gives them back."""

    policy: Literal["mixed", "spothedge", "on_demand"] = Field(
        "on_demand",
        description="Which machines: mixed (least expected cost, learnt from autoscale.history), "
        "spothedge (SkyServe's), on_demand.",
    )
    history: str = Field(
        "",
        description="Folder of a recorded market, one JSON for each zone; mixed learns from it. "
        "Empty: none.",
    )
    short_price: float = Field(
        25.0,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Mixed: what being short is worth, in whole needs bought on demand.",
    )
    over: int = Field(2, ge=0, le=64, description="Spothedge: spot machines beyond the need.")
    period_s: Seconds = Field(20.0, description="Time between two decisions.")
    call_deadline_s: Seconds = Field(
        10.0, description="A call to provider or service that takes longer has failed."
    )
    up_delay_s: float = Field(
        40.0, ge=0, le=86_400, description="More is needed for so long before more is bought."
    )
    down_delay_s: float = Field(
        600.0, ge=0, le=86_400, description="Less is needed for so long before something goes."
    )
    zero_after_s: Seconds = Field(
        900.0, description="A role with floor 0 that had no work for so long goes to nothing."
    )
    quantile: float = Field(
        0.9,
        ge=0.5,
        lt=1,
        allow_inf_nan=False,
        description="Of the forecast's past errors, which one is added to it.",
    )
    filled: Share = Field(0.8, description="Share of a replica's rate that is planned with.")
    band: float = Field(
        0.1,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Less is needed only if the load plus this share of it would fit.",
    )
    backlog_s: Seconds = Field(60.0, description="What waits is to be served within this time.")
    kv_filled: Share = Field(0.9, description="Share of KV pages that may be in use.")
    ttft_s: float = Field(
        0.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="First token's 90th percentile; when it is missed with all replicas there, a "
        "replica is reckoned slower. 0: none.",
    )
    give_up_s: Seconds = Field(
        600.0, description="What cannot be had for so long is let go, with a warning."
    )
    drain_s: Seconds = Field(30.0, description="How long a replica's work may take to leave it.")
    short_usd_per_h: Dollars = Field(
        10.0,
        description="What one missing replica costs in an hour; up to that much for the time a "
        "new machine takes, training gives machines up.",
    )
    provider: Literal["none", "kubernetes", "aws"] = Field(
        "none",
        description="Whom `sanderling autoscale` rents from: kubernetes (worker groups of a "
        "RayService), aws; none: it refuses to start.",
    )
    service_url: str = Field(
        "http://127.0.0.1:8000",
        min_length=1,
        description="Where `sanderling autoscale` finds the service: its load, and where its "
        "replicas are placed.",
    )
    service_key_file: str = Field(
        "", description="File that holds the service's http.machines_key in plain. Empty: none."
    )
    health_port: int = Field(
        8081,
        ge=0,
        le=65_535,
        description="Port of the controller's /healthz and /metrics; 0: none.",
    )
    prefill: RoleScale = RoleScale()
    decode: DecodeScale = DecodeScale()
    kubernetes: KubernetesSettings = KubernetesSettings()

    @model_validator(mode="after")
    def _learnt(self) -> "AutoscaleSettings":
        if self.policy == "mixed" and not self.history:
            raise ValueError(
                "autoscale.policy = 'mixed' learns from a recorded market and autoscale.history is "
                "empty; a folder with one JSON for each zone is accepted, or another policy"
            )
        return self
