"""`sanderling plan`: what it prints, its JSON, its picture and its exit codes, with an exhaustive
planner in the place of those that it knows."""

import json
from pathlib import Path

import pytest

from autoscale import plan_command
from cluster.cli import main
from tests.autoscale.placement.small import Every
from tests.autoscale.placement.test_workload import write

Captured = pytest.CaptureFixture[str]

WORKLOAD = """
[model]
name = "small-8b"
layers = 32
hidden = 4096
heads = 32
kv_heads = 8
head_dim = 128
feed_forward = 14336
vocab = 128256

[slo]
ttft_s = 1.5
tpot_s = 0.12

[[bucket]]
input_tokens = 128
output_tokens = 64
requests_per_s = 9.0

[offers]
file = "offers.toml"

[shapes]
tensor = [1]
"""


@pytest.fixture(autouse=True)
def every(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str) -> Every:
        if name != "aggregate":
            raise ValueError(f"no planner is called {name!r}")
        return Every()

    monkeypatch.setattr(plan_command, "planner", named)
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_it_prints_the_plan_and_all_that_was_asked(tmp_path: Path, capsys: Captured):
    assert run(str(write(tmp_path, WORKLOAD))) == 0
    out = capsys.readouterr().out
    for words in (
        "$/h (about",
        "proved best",
        "Buy",
        "Route",
        "128 + 64",
        "more requests",
        "Checked",
        "simulated:",
        "Instead",
        "without",
        "Where the numbers are from",
        "roofline",
        "offers.toml",
        "data sheet",
    ):
        assert words in out, words


def test_json_says_the_same(tmp_path: Path, capsys: Captured):
    path = write(tmp_path, WORKLOAD)
    assert run(str(path), "--json", "--explain", "128x64") == 0
    found = json.loads(capsys.readouterr().out)
    plan = found["plan"]
    assert found["feasible"] and found["faults"] == [] and found["simulated"]["attained"] > 0.88
    assert plan["usd_per_h"] == sum(p["usd_per_h"] for p in plan["purchases"])
    shares = plan["routing"][0]["shares"]
    assert plan["routing"][0]["bucket"] == [128, 64] and sum(shares.values()) == pytest.approx(1)
    costs = [a["plan"]["usd_per_h"] for a in found["alternatives"] if a["plan"]]
    assert costs == sorted(costs) and all(cost >= plan["usd_per_h"] for cost in costs)
    assert found["explained"]["choices"][0]["usd_per_1000"] > 0


def test_an_offer_is_explained(tmp_path: Path, capsys: Captured):
    path = write(tmp_path, WORKLOAD)
    assert run(str(path), "--json") == 0
    bought = {p["offer"] for p in json.loads(capsys.readouterr().out)["plan"]["purchases"]}
    assert run(str(path), "--explain", bought.pop()) == 0
    assert "Without that offer" in capsys.readouterr().out
    for idle in {"a", "b"} - bought:
        assert run(str(path), "--explain", idle) == 0
        assert "bought" in capsys.readouterr().out


def test_no_plan_is_exit_code_1_with_the_ways_out(tmp_path: Path, capsys: Captured):
    path = write(tmp_path, WORKLOAD.replace("tpot_s = 0.12", "tpot_s = 0.0001"))
    assert run(str(path)) == 1
    assert "no plan: slo or quota" in capsys.readouterr().err
    near = write(tmp_path, WORKLOAD.replace("tpot_s = 0.12", "tpot_s = 0.045"))
    if run(str(near), "--json") == 1:
        found = json.loads(capsys.readouterr().out)
        assert found["infeasible"] and [w["limit"] for w in found["ways_out"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--planner", "best"), "no planner is called 'best'"),
        (("--explain", "c"), "--explain c is not accepted; it takes an offer (a, b) or a bucket"),
        (("--explain", "1x1"), "(128x64)"),
    ],
)
def test_a_users_mistake_is_exit_code_2(arguments, words: str, tmp_path: Path, capsys):
    assert run(str(write(tmp_path, WORKLOAD)), *arguments) == 2
    assert words in capsys.readouterr().err
    assert run(str(tmp_path / "absent.toml")) == 2


def test_a_picture_is_drawn_and_refused_without_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
):
    path, png = write(tmp_path, WORKLOAD), tmp_path / "plan.png"
    assert run(str(path), "--picture", str(png)) == 0
    assert png.read_bytes()[:4] == b"\x89PNG" and png.stat().st_size > 5_000
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(str(path), "--picture", str(png)) == 2
    assert "sanderling[plot]" in capsys.readouterr().err


def test_a_plan_with_a_fault_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
):
    """A planner that forgets what it bought is not believed."""
    from dataclasses import replace

    class Forgetful(Every):
        def plan(self, problem, *, deadline_s=10.0):
            made = super().plan(problem, deadline_s=deadline_s)
            fewer = tuple(replace(p, machines=0, usd_per_h=0.0) for p in made.purchases)
            return replace(made, purchases=fewer, usd_per_h=0.0, bound_usd_per_h=0.0)

    monkeypatch.setattr(plan_command, "planner", lambda name: Forgetful())
    assert run(str(write(tmp_path, WORKLOAD))) == 1
    assert "The check finds fault" in capsys.readouterr().out
