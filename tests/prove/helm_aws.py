"""Proof rows of machines from AWS, over moto's server under our layer (tests/aws_double): contract,
faults one by one with the loop in compressed time, and the documented permissions.

No row was measured against AWS itself.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.autoscale.providers.test_aws_loop import FAULTS, noticed, with_fault
from tests.aws_double.cloud import AwsCloud, cloud
from tests.aws_double.scene import NEED, ON_DEMAND, OVER, Scene, played_scene
from tests.aws_double.site import AwsSite, played
from tests.prove.attempt import attempt
from tests.prove.row import Row
from tests.prove.suites import Suite, run

SUITES = (
    Suite(
        "EC2: the provider contract, under the documented policy",
        ("tests/autoscale/providers/test_aws.py",),
    ),
    Suite(
        "EC2: errors told apart, backoff, lost answers, late listings, orphans",
        ("tests/autoscale/providers/test_aws_faults.py",),
    ),
    Suite(
        "EC2: notices twice, late, of strangers, unreadable; IMDSv2 with 401, 404, 500",
        (
            "tests/autoscale/providers/test_aws_notices.py",
            "tests/autoscale/providers/test_aws_imds.py",
        ),
    ),
    Suite("EC2: kinds, mixes, prices, scores", ("tests/autoscale/providers/test_aws_sale.py",)),
)


def rows() -> Iterator[Row]:
    """The table of AWS."""
    for suite in SUITES:
        yield from attempt(suite.shows, partial(run, suite))
    with cloud() as double:
        yield from attempt("EC2: a notice", partial(notice, double))
        for name in FAULTS:
            yield from attempt(f"EC2: {name}", partial(fault, double, name))
        yield from attempt("EC2: permissions", partial(permissions, double))


def notice(double: AwsCloud) -> Row:
    """What is between a notice and the end of its machine."""
    doomed: list[str] = []

    async def play(scene: Scene) -> None:
        doomed.append(await noticed(scene))

    with tempfile.TemporaryDirectory() as folder:
        scene = played_scene(double, Path(folder), play)
    told_s = scene.site.now_s() - 200.0
    at_s = {(what, name): at_s - told_s for at_s, what, name in scene.done}
    new = [name for (what, name), when_s in at_s.items() if what == "launch" and when_s > -1]
    ready_s = max(scene.service.ready_s[name] for name in new if name in scene.service.ready_s)
    drained_s, ended_s = at_s["drain", doomed[0]], at_s["end", doomed[0]]
    bought_s = min(at_s["launch", name] for name in new)
    ready_s -= told_s
    return Row(
        "EC2: bought, answering, drained, given back after a notice of 120 s",
        "in this order, within 120 s; never fewer than needed",
        f"after {bought_s:.0f}, {ready_s:.0f}, {drained_s:.0f}, {ended_s:.0f} s of 120; "
        f"never fewer than {min(scene.answering)} answered, {NEED} are needed",
        bought_s < ready_s <= drained_s < ended_s < 120.0
        and min(scene.answering) >= NEED
        and not scene.wrong,
    )


def fault(double: AwsCloud, name: str) -> Row:
    """The scene of the notice with one fault."""
    with tempfile.TemporaryDirectory() as folder:
        scene = with_fault(double, Path(folder), name)
    orphans, alive = scene.orphans(), len(scene.site.alive())
    broken = f", {len(scene.wrong)} rules broken: {scene.wrong[0]}" if scene.wrong else ""
    return Row(
        f"EC2: {name}, under a notice",
        f"{NEED + OVER} machines again, none twice, none left behind, {ON_DEMAND} on demand always",
        f"{alive} machines, {len(orphans)} left behind, never fewer than {min(scene.answering)} "
        f"answered, {NEED} are needed{broken}",
        alive == NEED + OVER and not orphans and not scene.wrong and min(scene.answering) >= NEED,
    )


def permissions(double: AwsCloud) -> Row:
    """All calls under the documented policy, and what of it they need."""
    told: dict[str, set[str]] = {}

    async def work(site: AwsSite) -> None:
        made = await site.provider.launch(site.spot, "a")
        site.market.interrupt(made.id)
        await site.provider.machines()
        await site.provider.terminate(made.id)
        policy = double.overlay.policy
        assert policy is not None
        told.update(used=policy.used, written=policy.actions)

    with tempfile.TemporaryDirectory() as folder:
        played(double, Path(folder), work, least_score=1)
    unused = told["written"] - told["used"]
    return Row(
        "EC2: calls within the documented policy, and actions of it that nothing needs",
        "all; none",
        f"all; {', '.join(sorted(unused)) or 'none'} of {len(told['written'])}",
        not unused and len(told["written"]) > 10,
    )
