"""Settings of machines from AWS. Lists are texts with commas, as in the environment."""

from typing import Literal

from pydantic import Field

from cluster.settings.section import Seconds, Section

NAME = r"^[A-Za-z0-9._-]{1,64}$"


class AwsSettings(Section):
    """What may be bought on EC2, and how it is heard of."""

    region: str = Field(
        "", description="Region, as us-east-1. Empty: as boto3 finds it (AWS_DEFAULT_REGION)."
    )
    cluster: str = Field(
        "sanderling",
        pattern=NAME,
        description="Value of the tag sanderling/cluster; two services need two names.",
    )
    launch_template: str = Field(
        "",
        description="Launch template of the machines, its id or name: image, network, role, disk.",
    )
    template_version: str = Field(
        "$Default", min_length=1, description="Version of it: a number, $Default or $Latest."
    )
    subnets: str = Field(
        "", description="Subnets with commas, one for each zone. Empty: each zone's default."
    )
    types: str = Field(
        "g*,p*", min_length=1, description="Instance types with commas; * stands for anything."
    )
    kinds: str = Field("", description="Kinds of GPU with commas, as a10g,l4. Empty: all known.")
    accelerators: int = Field(
        1, ge=0, le=64, description="GPUs that a machine must have; 0: any number."
    )
    mix: Literal["zone", "region"] = Field(
        "zone",
        description="An offer is all types of one kind in one zone, or in all zones together.",
    )
    mix_within: float = Field(
        0.25,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="Types dearer than the cheapest of their mix by more than this share stay out.",
    )
    quota: int = Field(8, ge=0, le=10_000, description="Most machines of one offer at once.")
    startup_s: Seconds = Field(
        180.0, description="From the asking until a replica answers, as offers say it."
    )
    refresh_s: Seconds = Field(300.0, description="How long spot prices and scores are believed.")
    least_score: int = Field(
        0,
        ge=0,
        le=10,
        description="Spot offers of a lower placement score (1 to 10) are left out; 0: not asked.",
    )
    queue_url: str = Field(
        "", description="SQS queue of interruption notices. Empty: by the machines' tags alone."
    )
    rebalance_s: float = Field(
        0.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="A machine that EC2 holds likely to be taken is given up after so long; 0: "
        "kept until its notice.",
    )
