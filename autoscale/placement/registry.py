"""The planners by name, imported when one is asked for; each is built without arguments."""

from typing import cast

from autoscale.placement.planner import Planner
from cluster.registry import Registry

PLANNERS = Registry(
    "planner",
    {
        "aggregate": "autoscale.placement.aggregate:AggregatePlanner",
        "exhaustive": "autoscale.placement.exhaustive:ExhaustivePlanner",
        "pools": "autoscale.placement.pools:PoolsPlanner",
        "shares": "autoscale.placement.shares:SharesPlanner",
        "spans": "autoscale.placement.spans:SpansPlanner",
        "spotserve": "autoscale.placement.spotserve:SpotServePlanner",
    },
)


def planner(name: str) -> Planner:
    """The planner of that name. ValueError lists the known ones."""
    return cast(Planner, PLANNERS.load(name)())
