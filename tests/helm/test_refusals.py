"""Wrong values are refused by both majors, in words that name the value."""

from collections.abc import Mapping

import pytest

from tests.helm.chart import MAJORS, Helm

A10G = "--set=workers.a10g.kind=a10g"
FLOOR = "--set=workers.a10g.onDemand.min=1,workers.a10g.onDemand.max=2"
# What is said, to which flags: the value's name, and what it should have been.
WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a typo": (("--set=front.replcas=2",), ("front", "replcas")),
    "a typo in a worker": ((A10G, "--set=workers.a10g.spots.max=2"), ("workers", "a10g", "spots")),
    "a typo in the settings": (("--set=settings.engine.kv_token=16",), ("engine", "kv_token")),
    "a text for a number": (("--set-string=front.replicas=two",), ("front", "replicas")),
    "a number for a text": (("--set=settings.model=7",), ("settings", "model")),
    "out of bounds": (("--set=settings.engine.page_tokens=1000",), ("page_tokens", "256")),
    "an unknown GPU": (("--set=workers.a.kind=h900",), ("workers", "kind", "h100")),
    "an unknown policy": (("--set=settings.autoscale.policy=greedy",), ("policy", "spothedge")),
    "a secret in plain sight": (("--set=settings.http.api_key=s3cret",), ("http", "api_key")),
    "derived by the chart": (("--set=settings.http.host=::1",), ("settings", "http", "host")),
    "a name that is no label": (("--set=workers.A_10.kind=a10g",), ("workers", "A_10")),
    "a digest that is none": (("--set=images.cpu.digest=latest",), ("images", "cpu", "digest")),
    "a quantity that is none": (
        ("--set=head.resources.requests.memory=4GB",),
        ("head", "resources", "requests", "memory"),
    ),
    "min above max": (
        (A10G, "--set=workers.a10g.onDemand.min=3,workers.a10g.onDemand.max=2"),
        ("workers.a10g.onDemand.min = 3", "workers.a10g.onDemand.max = 2"),
    ),
    "spot without a floor": (
        (A10G, "--set=workers.a10g.spot.min=1,workers.a10g.spot.max=4"),
        ("workers.a10g.spot.max", "onDemand.min of at least 1"),
    ),
    "spot with the floor of another role": (
        (
            *(A10G, FLOOR, "--set=workers.a10g.role=decode"),
            "--set=workers.l4.kind=l4,workers.l4.role=prefill,workers.l4.spot.max=2",
        ),
        ("workers.l4.spot.max", "role prefill"),
    ),
    "nobody to answer": ((A10G, "--set=workers.a10g.onDemand.max=2"), ("workers", "at least 1")),
    "above the budget": (
        (A10G, FLOOR, "--set=workers.a10g.onDemand.usdPerHour=3,budget.usdPerHour=5"),
        ("budget.usdPerHour = 5.00", "6.00 USD/h", "3.00 at their min"),
    ),
    "a budget without prices": (
        (A10G, FLOOR, "--set=budget.usdPerHour=5"),
        ("workers.a10g", "usdPerHour"),
    ),
    "two autoscalers": (
        ("--set=ray.autoscaler.enabled=true",),
        ("controller.enabled", "ray.autoscaler.enabled"),
    ),
    "no image for AMD": (
        ("--set=workers.m.kind=mi300x,workers.m.onDemand.min=1,workers.m.onDemand.max=1",),
        ("workers.m.kind = mi300x", "images.rocm.repository"),
    ),
    "a drain longer than its grace": (
        ("--set=drain.deadlineSeconds=100",),
        ("drain.deadlineSeconds = 100", "drain.gracePeriodSeconds = 110"),
    ),
    "a grace longer than a notice": (("--set=drain.gracePeriodSeconds=300",), ("drain", "120")),
    "fault tolerance without a Redis": (
        ("--set=head.gcsFaultTolerance.enabled=true",),
        ("head.gcsFaultTolerance.redisAddress",),
    ),
    "an Ingress without a host": (("--set=ingress.enabled=true",), ("ingress.host",)),
    "a null where a thing is needed": (
        ("--set=drain.deadlineSeconds=null",),
        ("drain", "deadlineSeconds"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("major", MAJORS)
def test_refused_with_its_name(helms: Mapping[int, Helm], major: int, name: str):
    flags, words = WRONG[name]
    said = helms[major].refuse(*flags)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("major", MAJORS)
def test_the_right_ones_are_taken(helms: Mapping[int, Helm], major: int):
    """The same flags with what the messages say would be accepted: so it is the value that is
    refused, and not all of them."""
    helms[major].template(A10G, FLOOR, "--set=workers.a10g.spot.min=1,workers.a10g.spot.max=4")
    helms[major].template(
        *(A10G, FLOOR, "--set=workers.a10g.onDemand.usdPerHour=3,budget.usdPerHour=6"),
        *("--set=front.replicas=2", "--set=drain.deadlineSeconds=95"),
        "--set=controller.enabled=false,ray.autoscaler.enabled=true",
    )
