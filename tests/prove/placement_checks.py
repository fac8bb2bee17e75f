"""Proof rows of what every plan rests on: the catalogue, the rates, the simulation and the
feasibility checker, and of who may import what. Fresh seeds each run, which the rows name."""

import math
import random
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from autoscale.catalog.coefficients import read_distserve
from autoscale.catalog.kinds import read_kinds
from autoscale.catalog.memory import MemoryRoom
from autoscale.catalog.model import ModelSize
from autoscale.catalog.roofline import Roofline
from autoscale.catalog.steps import read_splitwise
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.feasible import check
from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import InfeasibleError, Planner, Problem
from autoscale.placement.registry import planner
from autoscale.placement.simulation import BUDGET_TOKENS, Fleet, Request, Server, simulate
from autoscale.placement.workload import read_workload
from tests.autoscale.placement.mutations import MUTATIONS
from tests.autoscale.placement.small import MODEL, Every, random_problem
from tests.prove.attempt import attempt
from tests.prove.row import Row
from tests.prove.suites import Suite, run

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
PLANS, RATES = 40, 40
BANNED = ("ray", "torch", "boto3", "kubernetes", "httpx", "requests", "aiohttp", "starlette")

SUITES = (
    Suite(
        "bad tables, offers and workloads are refused with their row", ("tests/autoscale/catalog",)
    ),
    Suite(
        "explanations are what planning again gives; the command, its JSON and its exit codes",
        ("tests/autoscale/placement/test_explain.py", "tests/autoscale/test_plan_command.py"),
    ),
)


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured; about four minutes."""
    seed = secrets.randbelow(10**6)
    yield from attempt("import autoscale, all modules", imports)
    yield from attempt("simulation against M/D/1", lambda: md1(seed))
    yield from attempt("rates against the simulation", lambda: rates(seed))
    yield from attempt("plans of random problems", lambda: plans(Every(), seed))
    yield from attempt("plans of the aggregate planner", lambda: plans(planner("aggregate"), seed))
    yield from attempt("examples", examples)
    yield from attempt("roofline", roofline)
    for suite in SUITES:
        yield from attempt(suite.shows, lambda suite=suite: run(suite))  # type: ignore[misc]


def imports() -> Row:
    """Of a fresh interpreter that has imported every module of the core."""
    code = (
        "import importlib, pkgutil, sys, autoscale\n"
        "names = [m.name for m in pkgutil.walk_packages(autoscale.__path__, 'autoscale.')]\n"
        "core = [n for n in names if not n.startswith('autoscale.providers')]\n"
        "[importlib.import_module(name) for name in core]\n"
        f"print(len(core), *sorted(set(sys.modules) & set({BANNED!r})))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, *found = done.stdout.split()
    measured = f"{count} modules bring {', '.join(found) or 'none'}"
    return Row("import autoscale: Ray, torch, cloud SDKs, HTTP", "none", measured, not found)


def md1(seed: int) -> Row:
    """Prompts that fill a step each, Poisson arrivals: the mean first token of the simulation
    against Pollaczek and Khinchine."""
    step_s, count, chance, worst = 0.05, 100_000, random.Random(seed), 0.0
    bucket = Bucket(BUDGET_TOKENS, 1)
    for busy in (0.3, 0.5, 0.7):
        server = Server(lambda prompt, sequences, context: step_s, 10**9, "mixed")
        shape = Purchase("o", 1, ReplicaShape("k"), 1, 0)
        plan = Plan((shape,), 0, 0, "", routing={bucket: {0: 1.0}})
        now_s, arriving = 0.0, []
        for _ in range(count):
            now_s += chance.expovariate(busy / step_s)
            arriving.append(Request(bucket, now_s))
        Fleet(plan, [[server]], lambda tokens: 0.0).run(arriving)
        mean_s = sum(request.ttft_s for request in arriving) / count
        theory_s = step_s + busy * step_s / (2 * (1 - busy))
        worst = max(worst, abs(mean_s / theory_s - 1))
    check_name = f"simulation: mean first token of an M/D/1 queue (seed {seed})"
    return Row(check_name, "within 3 %", f"worst of 3 loads {worst:.2%}", worst <= 0.03)


def rates(seed: int) -> Row:
    """Fleets of four at exactly the rate that a profile allows them: how many keep the SLO."""
    chance, kept, least = random.Random(seed), 0, 1.0
    profile, tried = Roofline(read_kinds(), MODEL), 0
    while tried < RATES:
        shape = ReplicaShape(chance.choice(("l4", "a10g", "a100-40g", "a100-80g", "h100")))
        bucket = Bucket(chance.choice((64, 256, 1024, 3000)), chance.choice((32, 128, 400)))
        slo = Slo(
            chance.uniform(0.3, 3), chance.uniform(0.02, 0.15), chance.choice((0.8, 0.9, 0.95))
        )
        rate = profile.requests_per_s(shape, bucket, slo)
        if rate <= 0:
            continue
        tried += 1
        plan = Plan((Purchase("o", 4, shape, 4, 0),), 0, 0, "", routing={bucket: {0: 1.0}})
        demand = Demand({bucket: 4 * rate}, slo)
        outcome = simulate(plan, demand, profile, [profile.kv_tokens(shape)], seed=tried)
        error = math.sqrt(slo.attained * (1 - slo.attained) / outcome.requests)
        kept += outcome.attained >= slo.attained - 2 * error
        least = min(least, outcome.attained - slo.attained)
    name = f"rates of formulas, four replicas at full load, simulated (seed {seed})"
    measured = f"{kept} of {RATES} keep the SLO; worst {least:+.1%} of the asked share"
    return Row(name, f">= {RATES - 2} of {RATES}", measured, kept >= RATES - 2)


def solved(chosen: Planner, seed: int) -> Iterator[tuple[Problem, Plan]]:
    """Random problems that have a plan."""
    chance, found = random.Random(seed), 0
    while found < PLANS:
        problem = random_problem(chance)
        try:
            plan = chosen.plan(problem, deadline_s=10)
        except InfeasibleError:
            continue
        found += 1
        yield problem, plan


def plans(chosen: Planner, seed: int) -> Iterator[Row]:
    """Each plan is checked, and then each way of breaking it."""
    faults: list[str] = []
    missed: Counter[str] = Counter()
    tried = 0
    for problem, plan in solved(chosen, seed):
        faults += [fault.what for fault in check(plan, problem, seed=seed).faults]
        for name, (mutate, subjects) in MUTATIONS.items():
            tried += 1
            broken = check(*mutate(plan, problem), seed=seed)
            if not subjects & {fault.subject for fault in broken.faults}:
                missed[name] += 1
    where = f"{PLANS} random problems, planner {chosen.name} (seed {seed})"
    first = f": {faults[0]}" if faults else ""
    yield Row(f"plans checked: {where}", "no fault", f"{len(faults)} faults{first}", not faults)
    words = f", not {', '.join(missed)}" if missed else ""
    measured = f"{tried - missed.total()} of {tried} noticed{words}"
    yield Row(f"broken plans, {len(MUTATIONS)} ways: {where}", "all noticed", measured, not missed)


def examples() -> Iterator[Row]:
    """The worked examples have plans that the checker confirms."""
    for name in ("chat-8b", "laptop"):
        read = read_workload(ROOT / "docs" / "examples" / f"{name}.toml")
        plan = planner(read.planner).plan(read.problem, deadline_s=read.deadline_s)
        verdict = check(plan, read.problem)
        kept = verdict.outcome.attained if verdict.outcome else 0.0
        measured = f"{plan.usd_per_h:.3g} $/h, gap {plan.gap:.1%}, {kept:.1%} within the SLO"
        ok = verdict.feasible and not verdict.unchecked
        yield Row(f"docs/examples/{name}.toml", "a plan without fault", measured, ok)


def roofline() -> Iterator[Row]:
    """How far it is from what was measured: one card, and cards that share layers."""
    if not DATA.is_dir():
        yield Row("roofline against measurements", "told", "skipped, data absent", True)
        return
    kinds, steps = read_kinds(), [(128, 0, 0), (512, 0, 0), (2048, 0, 0), (0, 1, 512), (0, 32, 512)]
    opt = ModelSize("opt-13b", 40, 5120, 40, 40, 128, 20480, 50272, 2)
    files = DATA / "distserve" / "profiler-a100-80g.distserve.json", DATA / "distserve"
    fits = read_distserve(files[0], files[1] / "max_num_tokens.csv", "facebook/opt-13b")
    one = ReplicaShape("a100-80g")
    guess = Roofline(kinds, opt)
    ratios = [guess.step_s(one, *step) / fits.step_s(one, *step) for step in steps]
    spread = f"x {min(ratios):.2f} to x {max(ratios):.2f} of the measured times"
    ok = min(ratios) >= 1 / 1.6 and max(ratios) <= 1.6
    yield Row("roofline against DistServe, OPT-13B on one A100", "x 0.62 to x 1.6", spread, ok)
    llama = ModelSize("llama2-70b", 80, 8192, 64, 8, 128, 28672, 32000)
    path, room = DATA / "splitwise" / "perf_model.csv", MemoryRoom(kinds, llama)
    table = read_splitwise(path, "llama2-70b", room, noise=0.2)
    guess = Roofline(kinds, llama)
    shapes = [ReplicaShape(kind, tensor) for kind in ("a100-80g", "h100") for tensor in (2, 4, 8)]
    ratios = [guess.step_s(s, *t) / table.step_s(s, *t) for s in shapes for t in steps]
    spread = f"x {min(ratios):.2f} to x {max(ratios):.2f} of the measured times"
    yield Row("roofline against Splitwise, Llama-2-70B on 2 to 8 cards", "told", spread, True)
