"""The loop in virtual time: a provider out of a market, a service out of requests, the command."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from autoscale.loop.record import head_of, make_loop
from autoscale.plan_command import plan
from autoscale.providers.provider import LaunchRefused
from autoscale.simulate.loop import POINTS, World
from autoscale.simulate.rented import MarketProvider, SteppedClock
from autoscale.simulate.requests import ReplicaSpeed, Request
from autoscale.simulate_command import simulate
from cluster.settings.autoscale import AutoscaleSettings, DecodeScale, RoleScale
from tests.autoscale.spot_markets import market


def test_the_market_gives_tells_and_takes():
    """Two machines in the first step, one in the second, with a notice of 100 s."""
    made = market([[2, 0], [1, 0], [1, 0]])
    clock = SteppedClock()
    provider = MarketProvider(made, clock, notice_s=100.0)
    a, b, od = made.offers

    async def going() -> None:
        first = await provider.launch(a, "t1")
        assert await provider.launch(a, "t1") == first
        second = await provider.launch(a, "t2")
        for offer in (a, b):
            with pytest.raises(LaunchRefused) as refused:
                await provider.launch(offer, "t3")
            assert refused.value.kind == "capacity"
        await provider.launch(od, "t4")
        clock.time_s = 310.0
        assert provider.pass_time() == []
        by_id = {machine.id: machine for machine in await provider.machines()}
        assert by_id[second.id].doomed_s == 410.0 and by_id[first.id].doomed_s is None
        clock.time_s = 420.0
        assert provider.pass_time() == [second.id]
        events, cursor = await provider.events(0)
        assert [(event.kind, event.value) for event in events] == [
            ("notice", 100.0),
            ("preempt", 1),
        ]
        assert (await provider.events(cursor))[0] == ()
        for _ in range(2):
            await provider.terminate(first.id)
        assert [machine.offer for machine in await provider.machines()] == ["od"]

    asyncio.run(going())
    assert provider.bill.spot_usd == pytest.approx(0.3 * 2 * 420 / 3600)
    assert provider.bill.on_demand_usd == pytest.approx(1.0 * 420 / 3600)


def world(requests: list[Request], steps: int = 24) -> World:
    settings = AutoscaleSettings(
        policy="on_demand",
        period_s=60.0,
        decode=DecodeScale(floor=2, cap=8, tokens_per_s=40.0),
        prefill=RoleScale(cap=0),
    )
    loop = make_loop(head_of(settings, "t"))
    made = market([[4, 4]] * steps)
    return World(made, loop, iter(requests), ReplicaSpeed(2, 1000.0, 0.1))


def test_every_request_is_served_once_and_what_is_paid_is_what_was_held():
    """Against sums by hand: a steady load on two replicas, which cost their hours."""
    requests = [Request(30.0 * n, 100, 50) for n in range(1, 200)]
    report = world(requests).run()
    assert report.load.served == 199 and report.load.waiting == 0
    assert report.load.first_s.at(0.5) == pytest.approx(0.1, rel=0.05)
    assert report.load.whole_s.at(0.5) == pytest.approx(0.1 + 50 * 0.1, rel=0.05)
    held_s = 60.0 * (report.steps - 1)
    assert report.usd == pytest.approx(2 * 1.0 * held_s / 3600, rel=0.02)
    assert report.actions["launch"] == 2 and report.actions["drain"] == 0


def test_the_course_does_not_grow():
    report = world([], steps=900).run()
    assert report.steps > 2 * POINTS
    assert POINTS <= len(report.course) <= 2 * POINTS
    gaps = np.diff([point.at_s for point in report.course])
    assert gaps[0] > 60.0 and (gaps == gaps[0]).all()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(simulate, ["--loop", "--days", "2", "--requests", "3000", *arguments])


def test_the_command_prints_draws_logs_and_explains(tmp_path: Path):
    log, picture = tmp_path / "log.jsonl", tmp_path / "course.png"
    result = run("--log", str(log), "--plot", str(picture), "--cap", "8")
    assert result.exit_code == 0, result.output
    for said in ("first token", "cost, spot", "between tokens", "requests moved"):
        assert said in result.output
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    explained = CliRunner().invoke(plan, [str(log), "--explain", "2"])
    assert explained.exit_code == 0, explained.output
    assert "decision 2" in explained.output and "byte for byte" in explained.output
    lines = log.read_bytes().splitlines(keepends=True)
    step = json.loads(lines[3])
    step["decision"]["needs"]["decode"]["need"] += 1
    lines[3] = json.dumps(step, separators=(",", ":")).encode() + b"\n"
    log.write_bytes(b"".join(lines))
    whole = CliRunner().invoke(plan, [str(log)])
    assert whole.exit_code == 1 and "the first is 3" in whole.output
    wrong = CliRunner().invoke(plan, [str(log), "--explain", "x"])
    assert isinstance(wrong.exception, ValueError) and "from 1 to" in str(wrong.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--policy", "single"), "do"), (("--requests", "900000000"), "larger --cap")],
)
def test_what_it_refuses_it_explains(arguments: tuple[str, ...], said: str):
    result = run(*arguments)
    assert isinstance(result.exception, ValueError) and said in str(result.exception)
