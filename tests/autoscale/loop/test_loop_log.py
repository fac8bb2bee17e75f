"""A recorded log decides itself again byte for byte, and every change in it is noticed."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoscale.loop.record import FileLog, head_of, make_loop, repeat
from autoscale.spot.levels import fit
from cluster.settings.autoscale import AutoscaleSettings, DecodeScale
from tests.autoscale.loop.plant import RATE, Plant, offer
from tests.autoscale.loop.plant import settings as made

OFFERS = (
    offer("s1", "spot", 0.3, quota=3),
    offer("s2", "spot", 0.35),
    offer("od", quota=5),
)


def recorded(policy: str) -> list[bytes]:
    """A run with losses, refusals and lost answers."""
    scale = DecodeScale(floor=1, cap=9, tokens_per_s=RATE)
    settings = made(policy=policy, history="made", decode=scale)
    draws = np.random.default_rng(5)
    history = (draws.random((500, 2)) < 0.95).astype(np.int64) * 6
    chain = fit(history, ("s1", "s2"), ("r", "q"), (1, 3, 6), 20.0)
    head = head_of(settings, "t", pools=("s1", "s2"), chain=chain)
    file = io.BytesIO()
    plant = Plant(
        lambda at_s: 200.0 if at_s < 400 else 500.0,
        settings,
        OFFERS,
        make_loop(head),
        FileLog(file, head),
    )

    def breaks(plant: Plant) -> None:
        step = len(plant.decisions)
        if step == 15:
            plant.cloud.empty = {"s1"}
        if step in (20, 31) and plant.cloud.rented:
            plant.cloud.doom(sorted(plant.cloud.rented)[0], 45.0)
        if step == 25:
            plant.cloud.faults["launch"] = ["lost answer", "hangs"]

    plant.run(50, breaks)
    return file.getvalue().splitlines(keepends=True)


@pytest.fixture(scope="module")
def logs() -> dict[str, list[bytes]]:
    return {policy: recorded(policy) for policy in ("mixed", "spothedge", "on_demand")}


@pytest.mark.parametrize("policy", ["mixed", "spothedge", "on_demand"])
def test_a_log_repeats_byte_for_byte(logs: dict[str, list[bytes]], policy: str):
    repeated = list(repeat(logs[policy]))
    assert len(repeated) == 50 and all(one.same for one in repeated)
    kinds = {act.act for one in repeated for act in one.step.decision.actions}
    assert {"launch", "serve", "drain", "terminate"} <= kinds


def changed(lines: list[bytes], number: int, change: Any) -> list[bytes]:
    step = json.loads(lines[number])
    change(step)
    text = json.dumps(step, separators=(",", ":"), ensure_ascii=False)
    return [*lines[:number], text.encode() + b"\n", *lines[number + 1 :]]


def test_what_was_changed_in_a_log_is_noticed(logs: dict[str, list[bytes]]):
    lines = logs["mixed"]
    place = next(n for n, line in enumerate(lines) if n and json.loads(line)["decision"]["actions"])

    def reason(step: Any) -> None:
        step["decision"]["actions"][0]["reason"] += "."

    def load(step: Any) -> None:
        step["signals"]["load"]["decode"]["queued_tokens"] += 50_000

    def fewer(step: Any) -> None:
        step["decision"]["needs"]["decode"]["need"] += 1

    assert all(one.same for one in repeat(changed(lines, place, lambda step: None)))
    for change in (reason, load, fewer):
        found = [one.line for one in repeat(changed(lines, place, change)) if not one.same]
        assert found and found[0] >= place + 1
    without = lines[:5] + lines[6:]
    assert not all(one.same for one in repeat(without))
    other = lines[0].replace(b'"short_price":25.0', b'"short_price":1.0')
    assert other != lines[0] and not all(one.same for one in repeat([other, *lines[1:]]))


def test_a_wrong_line_is_named(logs: dict[str, list[bytes]]):
    with pytest.raises(ValueError, match="line 3 of the log"):
        list(repeat([*logs["on_demand"][:2], b"{}\n"]))
    with pytest.raises(ValueError, match="line 1 of the log"):
        list(repeat([]))


def test_a_number_that_is_none_is_refused(logs: dict[str, list[bytes]]):
    def infinite(step: Any) -> None:
        step["signals"]["machines"] = []
        step["signals"]["now_s"] = float("inf")

    with pytest.raises(ValueError, match="line 3"):
        list(repeat(changed(logs["on_demand"], 2, infinite)))


def test_mixed_without_a_history_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="autoscale.history"):
        AutoscaleSettings(policy="mixed")
    with pytest.raises(ValueError, match="recorded market"):
        make_loop(head_of(made(policy="mixed", history="x"), "t"))
