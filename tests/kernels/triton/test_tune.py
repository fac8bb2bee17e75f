"""The tuner: what it chooses, what it leaves out; and that every candidate is one of its op."""

import time
from typing import Any

import pytest
import torch

from kernels.triton import tune, tune_cases
from kernels.triton.bench.measure import Contender, Timing
from kernels.triton.configs import TABLES, Config, tried
from kernels.triton.plan import Plan, run
from kernels.triton.targets import target
from tests.kernels.triton.conformance import DEVICE, watched

NAMES = [(each.key, each.rows, each.shapes[0].name) for each in tune_cases.tunings()]


def test_tunings_have_keys_of_the_table_and_names_of_their_own():
    text = "".join(path.read_text("utf-8") for path in TABLES)
    assert all(f'"{key}"' in text for key, _, _ in NAMES)
    assert len(set(NAMES)) == len(NAMES)
    for each in tune_cases.tunings():
        assert len(each.candidates) == len(set(map(str, each.candidates))) > 5, each.key
    few = tune_cases.tunings("w4_linear")
    assert few and {each.key for each in few} == {"w4_linear"}


@pytest.mark.parametrize("name", range(len(NAMES)), ids=lambda n: f"{NAMES[n][0]}-{NAMES[n][1]}")
def test_candidates_are_what_is_launched(name: int):
    """The tiles of a candidate reach the kernel, for every shape."""
    tuning = tune_cases.tunings()[name]
    config = tuning.candidates[-1]
    for shape in tuning.shapes:
        plans = shape.build(torch.device("meta"), target("sm_90"))
        with tried(tuning.key, config):
            plan = plans()[0]
        assert plan.config == config and 0 not in plan.grid
        assert plan.args.items() >= config.constants.items()
        assert shape.read_bytes > 10**5


SMALL = tune_cases._w4(3, 24, 128)._replace(other=None)
RIGHT = Config(0, {"BM": 16, "BN": 16, "BK": 64}, 4, 2)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch):
    """On the device at hand; a launch takes as many seconds as its tile has columns, and twice that
    on the second shape."""

    def timed(contenders: list[Contender], rounds: int) -> list[Timing]:
        contenders[0].call(0)
        return [Timing("", True, seconds=seconds.pop(0))]

    seconds: list[float] = []
    monkeypatch.setattr(tune, "measure", timed)
    monkeypatch.setattr(tune, "copies_for", lambda size: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made = tune.Session(torch.device(DEVICE), target("sm_90"), time.perf_counter() + 1000)
    with watched("sm_90"):
        yield made, seconds


def candidates(*configs: Config) -> list[tune.Measured]:
    return [tune.Measured(each, {}) for each in configs]


def test_the_least_geometric_mean_wins(session: Any):
    where, seconds = session
    seconds += [2.0, 3.0, 9.0, 1.0]
    two = Config(0, {"BM": 16, "BN": 32, "BK": 64}, 4, 2)
    shapes = (SMALL, SMALL._replace(name="another"))
    found = tune.tuned(
        where, tune_cases.Tuning("w4_linear", 16, shapes, ()), candidates(two, RIGHT)
    )
    # 2 and 9 against 3 and 1.
    assert [each.config for each in found] == [RIGHT, two]
    assert found[0].mean_s() == pytest.approx(3**0.5)


def test_what_fails_or_is_wrong_is_told_and_left_out(session: Any, monkeypatch: Any):
    where, seconds = session
    seconds += [5.0]
    bad, broken = RIGHT._replace(num_stages=7), RIGHT._replace(num_stages=9)

    def wrong(plan: Plan) -> None:
        if plan.config == broken:
            raise RuntimeError("out of resources\nand more")
        run(plan)
        if plan.config == bad:
            plan.args["out"].mul_(1.1)  # type: ignore[union-attr]

    monkeypatch.setattr(tune, "run", wrong)
    tuning = tune_cases.Tuning("w4_linear", 16, (SMALL,), ())
    found = tune.tuned(where, tuning, candidates(bad, broken, RIGHT))
    assert found[0].config == RIGHT and not found[0].failure
    failures = sorted(each.failure for each in found[1:])
    assert failures[0] == "RuntimeError: out of resources"
    assert failures[1].startswith("is wrong by 0.")


def test_an_entry_is_one_of_the_table():
    tuning = tune_cases.Tuning("w4_linear", 64, (), ())
    made = tune.entry(tuning, RIGHT._replace(programs=264))
    assert made == {
        "rows": 64, "BM": 16, "BN": 16, "BK": 64, "programs": 264, "warps": 4, "stages": 2,
    }  # fmt: skip
    assert "programs" not in tune.entry(tuning, RIGHT)
