"""Proof rows of the controller on Kubernetes: over the API server's double, fault by fault."""

import asyncio
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.autoscale.providers.kubernetes_faults import FAULTS, Fault, Outcome, play
from tests.prove.attempt import attempt
from tests.prove.row import Row
from tests.prove.suites import Suite, run

SUITES = (
    Suite(
        "the API double: versions, apply, watches, 410, budgets, rights; KubeRay's definitions",
        ("tests/kubernetes_double/test_double.py",),
    ),
    Suite(
        "provider kubernetes keeps the contract, and twelve broken ones are noticed",
        ("tests/autoscale/providers/test_kubernetes.py",),
    ),
    Suite(
        "notices, taints, lease, watches (dropped, stale, 410), ledger",
        ("tests/autoscale/providers/test_kubernetes_parts.py",),
    ),
    Suite(
        "notice, replacement, drain, eviction, end in this order; every right used, no other asked",
        (
            "tests/autoscale/providers/test_controller.py::"
            "test_a_notice_is_followed_by_replacement_drain_eviction_and_end_in_this_order",
        ),
    ),
    Suite(
        "the process in real time: two of them, SIGTERM, the other leads",
        ("-m", "slow", "tests/autoscale/providers/test_controller_process.py"),
    ),
)
TARGET = "converges, floor kept, no double launch, no orphan, given back in time"


def rows() -> Iterator[Row]:
    """The table of the controller."""
    for suite in SUITES:
        yield from attempt(suite.shows, partial(run, suite))
    for name, fault in FAULTS.items():
        yield from attempt(name, partial(_played, name, fault))


def _played(name: str, fault: Fault) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        outcome = asyncio.run(play(Path(folder), fault))
    wrong = outcome.wrong(fault)
    measured = "; ".join(wrong) if wrong else _said(outcome)
    yield Row(f"controller, {name}", TARGET, measured, not wrong)


def _said(outcome: Outcome) -> str:
    return (
        f"{outcome.made} pods made in all, {outcome.existing} machines at the end, "
        f"{len(outcome.orphans)} orphans, never fewer than {outcome.least} answering "
        f"({outcome.least_on_demand} on demand), {outcome.losses} lost, "
        f"{outcome.struck} faults met"
    )
