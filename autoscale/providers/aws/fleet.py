"""One machine by CreateFleet: an instant fleet of one, over all pools of a mix.

`price-capacity-optimized` picks, of the pools with the most room, the cheapest; on demand it is the
lowest price. The client token makes a launch idempotent: a request whose answer was lost is sent
again as it was, and EC2 gives the first one's answer.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoscale.catalog.offer import Offer
from autoscale.providers.aws import marks
from autoscale.providers.aws.errors import RETRY_S, refusal
from autoscale.providers.provider import LaunchRefused


@dataclass(frozen=True)
class Pool:
    """Machines of one type in one zone. usd_per_h: as of now."""

    instance_type: str
    zone: str
    subnet: str
    usd_per_h: float


@dataclass(frozen=True)
class Mix:
    """An offer, and the pools out of which EC2 may fulfil it: of one kind and number of GPUs."""

    offer: Offer
    pools: tuple[Pool, ...]


@dataclass(frozen=True)
class Template:
    """A launch template: its id (lt-...) or name, and a version."""

    name: str
    version: str = "$Default"

    def specification(self) -> dict[str, str]:
        key = "LaunchTemplateId" if self.name.startswith("lt-") else "LaunchTemplateName"
        return {key: self.name, "Version": self.version}


def client_token(cluster: str, token: str, refused: int) -> str:
    """64 characters: another one after each refusal, since EC2 repeats its answer to the same."""
    return hashlib.sha256(f"{cluster}\0{token}\0{refused}".encode()).hexdigest()


def request(mix: Mix, template: Template, cluster: str, token: str, refused: int) -> dict[str, Any]:
    """The arguments of create_fleet."""
    spot = mix.offer.market == "spot"
    overrides = [
        {"InstanceType": pool.instance_type, "SubnetId": pool.subnet} for pool in mix.pools
    ]
    strategy: dict[str, Any] = (
        {"SpotOptions": {"AllocationStrategy": "price-capacity-optimized"}}
        if spot
        else {"OnDemandOptions": {"AllocationStrategy": "lowest-price"}}
    )
    return {
        "Type": "instant",
        "ClientToken": client_token(cluster, token, refused),
        "LaunchTemplateConfigs": [
            {
                "LaunchTemplateSpecification": template.specification(),
                "Overrides": overrides,
            }
        ],
        "TargetCapacitySpecification": {
            "TotalTargetCapacity": 1,
            "DefaultTargetCapacityType": "spot" if spot else "on-demand",
        },
        "TagSpecifications": [
            {
                "ResourceType": "instance",
                "Tags": marks.tags(cluster=cluster, token=token, offer=mix.offer.name),
            }
        ],
        **strategy,
    }


def instance_of(answer: Mapping[str, Any]) -> str:
    """The id of the machine that was made. LaunchRefused where there is none; RuntimeError where
    the errors leave open whether there is one."""
    made = [name for entry in answer.get("Instances", ()) for name in entry["InstanceIds"]]
    if made:
        return str(made[0])
    told = [
        (error.get("ErrorCode", ""), error.get("ErrorMessage", ""))
        for error in answer.get("Errors", ())
    ]
    if not told:
        raise LaunchRefused("capacity", RETRY_S["capacity"], "EC2 made no machine and told no why")
    refused = refusal(told)
    if refused is None:
        raise RuntimeError(f"fleet {answer.get('FleetId')}: {told}")
    raise refused
