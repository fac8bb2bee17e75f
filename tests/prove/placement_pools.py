"""Proof rows of pools for prefill and decode (DistServe, Splitwise) and of training shares (Whale,
AMP, HetPipe): formulas, exhaustive search, published coefficients and tables."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import inf
from pathlib import Path

import numpy as np

from autoscale.placement.demand import Slo
from autoscale.placement.goodput import (
    Arrival,
    Coefficients,
    Replica,
    Served,
    colocated,
    disaggregated,
    goodput,
    mean_ttft_s,
    poisson,
    prefill,
)
from autoscale.placement.goodput_advice import advise
from autoscale.placement.planner import InfeasibleError
from autoscale.placement.pools import PoolsPlanner
from autoscale.placement.shares import batch_shares, step_s
from autoscale.placement.shares_pipeline import fastest_pipeline, fastest_workers
from tests.autoscale.placement import pools_oracle, shares_oracle
from tests.prove import splitwise_designs
from tests.prove.placement_checks import plans
from tests.prove.row import Row

INSTANCES = 200
DATA = Path(__file__).parents[3] / "shared" / "data" / "distserve"
PLAIN = Coefficients((20.0, 0.1, 7e-6), (20.0, 6e-4, 0.04), (7.0, 6e-4, 0.16), 95)
REQUESTS = 1000
# Settings of the paper: mean tokens of prompts and answers (0 spread: all alike), seconds to the
# first token and from token to token, 90 % of requests.
SETTINGS = {
    "OPT-13B, 512 + 64 tokens": ("facebook/opt-13b", 512.0, 64.0, 0.0, Slo(0.4, 0.04)),
    "OPT-13B, chat": ("facebook/opt-13b", 755.5, 200.3, 1.0, Slo(0.2, 0.1)),
    "OPT-66B, chat": ("facebook/opt-66b", 755.5, 200.3, 1.0, Slo(2.5, 0.15)),
    "OPT-66B, code": ("facebook/opt-66b", 171.3, 98.2, 1.0, Slo(0.125, 0.2)),
}


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured; about three minutes."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    yield pools_row(seed)
    yield shares_row(seed)
    yield pipeline_row(seed)
    yield workers_row(seed)
    yield from plans(PoolsPlanner(), seed % 10**6)
    yield from queue_rows()
    if DATA.exists():
        yield from goodput_rows()
        yield advice_row()
    else:
        yield Row("DistServe's coefficients", "measured", "skipped, data absent", True)
    yield from splitwise_designs.rows()


def compared(
    name: str, seed: int, both: Callable[[np.random.Generator], tuple[float, float]]
) -> Row:
    """A planner's value and the exhaustive one (inf: infeasible) on random instances."""
    random, equal, infeasible = np.random.default_rng(seed), 0, 0
    for _ in range(INSTANCES):
        found, wanted = both(random)
        equal += found == wanted or abs(found - wanted) <= 1e-6 * abs(wanted)
        infeasible += wanted == inf
    measured = f"{equal} of {INSTANCES}, {infeasible} infeasible (seed {seed})"
    return Row(name, "all", measured, equal == INSTANCES)


def pools_row(seed: int) -> Row:
    def both(random: np.random.Generator) -> tuple[float, float]:
        problem = pools_oracle.random_problem(random)
        wanted = pools_oracle.cheapest(problem)
        try:
            return PoolsPlanner().plan(problem).usd_per_h, wanted
        except InfeasibleError:
            return inf, wanted

    return compared("pools: cost = cheapest of all sizes", seed, both)


def shares_row(seed: int) -> Row:
    def both(random: np.random.Generator) -> tuple[float, float]:
        workers, samples = shares_oracle.random_workers(random)
        wanted = shares_oracle.least_step_s(workers, samples)
        try:
            return step_s(workers, batch_shares(workers, samples)), wanted
        except InfeasibleError:
            return inf, wanted

    return compared("batch shares (Whale): step = shortest of all", seed, both)


def pipeline_row(seed: int) -> Row:
    def both(random: np.random.Generator) -> tuple[float, float]:
        devices, layers, flights = shares_oracle.random_pipeline(random)
        wanted = shares_oracle.best_rate(devices, layers, flights) or inf
        try:
            pipeline = fastest_pipeline(devices, layers, most_in_flight=flights)
            return pipeline.minibatches_per_s, wanted
        except InfeasibleError:
            return inf, wanted

    return compared("pipeline partition (HetPipe): rate = best of all", seed, both)


def workers_row(seed: int) -> Row:
    def both(random: np.random.Generator) -> tuple[float, float]:
        devices, layers, flights = shares_oracle.random_pipeline(random, 4, 4)
        wanted = shares_oracle.best_workers_rate(devices, layers, flights) or inf
        try:
            workers = fastest_workers(devices, layers, most_in_flight=flights)
            return workers.minibatches_per_s, wanted
        except InfeasibleError:
            return inf, wanted

    return compared("virtual workers (AMP, HetPipe): rate = best of all", seed, both)


def queue_rows() -> Iterator[Row]:
    """One prompt at a time, Poisson arrivals: the formula's mean."""
    prompt_s, worst = PLAIN.prompt_s([512]), 0.0
    for stages in (1, 2):
        for busy in (0.3, 0.5, 0.7):
            rate = busy * stages / prompt_s
            means = []
            for seed in range(3):
                arrivals = poisson([(512, 1)] * 150_000, rate, seed)
                first_s = prefill(arrivals, [Replica(PLAIN, 10**6, stages, batch_tokens=1)])
                waits = [f - a.at_s for f, a in zip(first_s, arrivals, strict=True)]
                means.append(float(np.mean(waits)))
            mean = sum(means) / len(means)
            worst = max(worst, abs(mean / mean_ttft_s(prompt_s, rate, stages) - 1))
    name = "M/D/1 limit of the time to the first token"
    yield Row(name, "within 2 %", f"{worst:.2%} at worst", worst <= 0.02)


@cache
def published(engine: str) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Coefficients of "distserve" or "vllm", by model and tensor degree."""
    path = DATA / f"profiler-a100-80g.{engine}.json"
    content: dict[str, dict[str, dict[str, list[float]]]] = json.loads(path.read_text("utf-8"))
    return content


def replicas(model: str, engine: str) -> Iterator[tuple[int, Replica]]:
    """(accelerators, replica) of each tensor degree and one or two stages that they measured."""
    with (DATA / "max_num_tokens.csv").open(encoding="utf-8") as file:
        kv = {
            (int(row["tp"]), int(row["pp"])): int(row["max_num_tokens"])
            for row in csv.DictReader(file)
            if row["model"] == model
        }
    for tensor, fit in published(engine)[model].items():
        for stages in (1, 2):
            if (int(tensor), stages) in kv and int(tensor) * stages <= 8:
                yield int(tensor) * stages, Replica(_times(fit), kv[int(tensor), stages], stages)


def _times(fit: dict[str, list[float]]) -> Coefficients:
    def three(name: str) -> tuple[float, float, float]:
        a, b, c = fit[name]
        return a, b, c

    threshold: int = fit["decoding_large_small_bs_threshold"]  # type: ignore[assignment]
    parts = (three("prefill"), three("decoding_smallbs"), three("decoding_largebs"))
    return Coefficients(*parts, threshold)


def lengths(prompt: float, answer: float, spread: float, count: int) -> list[tuple[int, int]]:
    """Log-normal about the means, within OPT's 2048 tokens; all alike for no spread."""
    if spread == 0:
        return [(int(prompt), int(answer))] * count
    random, sigma = np.random.default_rng(0), np.sqrt(np.log(1 + spread**2))

    def drawn(mean: float) -> np.ndarray:
        values = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
        return np.clip(np.round(values), 2, 2040).astype(int)

    prompts = drawn(prompt)
    answers = np.minimum(drawn(answer), 2048 - prompts)
    return list(zip(prompts.tolist(), np.maximum(answers, 2).tolist(), strict=True))


Serve = Callable[[Sequence[Arrival]], list[Served]]


def goodput_rows() -> Iterator[Row]:
    """Per GPU, the best degrees of each: apart with DistServe's coefficients, together with vLLM's,
    as the paper compares them, and with DistServe's own."""
    for name, (model, prompt, answer, spread, slo) in SETTINGS.items():
        some = lengths(prompt, answer, spread, REQUESTS)
        apart, split = apart_per_gpu(model, some, slo)
        vllm, own = (together_per_gpu(model, engine, some, slo) for engine in ("vllm", "distserve"))
        target = ">= 2 x" if name != "OPT-66B, chat" else "told"
        measured = (
            f"{apart:.2f} / {vllm:.2f} requests/s = {apart / vllm:.2f} x ({split}); both with "
            f"DistServe's coefficients {apart / own:.2f} x"
        )
        ok = apart >= 2 * vllm or target == "told"
        yield Row(f"goodput per GPU, apart / together: {name}", target, measured, ok)


def together_per_gpu(model: str, engine: str, some: Sequence[tuple[int, int]], slo: Slo) -> float:
    return max(
        goodput(lambda a, r=r: colocated(a, [r]), some, slo, most=12.0 * gpus) / gpus  # type: ignore[misc]
        for gpus, r in replicas(model, engine)
    )


def apart_per_gpu(model: str, some: Sequence[tuple[int, int]], slo: Slo) -> tuple[float, str]:
    """The best degrees of each phase alone, then the best numbers of replicas together."""
    first = max(
        (goodput(_prompts_only(r), some, slo, most=20.0 * gpus) / gpus, n, gpus, r)
        for n, (gpus, r) in enumerate(replicas(model, "distserve"))
    )
    then = max(
        (goodput(_answers_only(r), some, slo, most=40.0 * gpus) / gpus, n, gpus, r)
        for n, (gpus, r) in enumerate(replicas(model, "distserve"))
    )
    best, split = 0.0, ""
    for prefills in range(1, 7):
        for decodes in range(1, 4):
            gpus = prefills * first[2] + decodes * then[2]
            most = min(prefills * first[0] * first[2], decodes * then[0] * then[2])
            if 1.3 * most / gpus <= best:
                continue
            serve = _apart([first[3]] * prefills, [then[3]] * decodes)
            found = goodput(serve, list(some) * 2, slo, most=1.3 * most) / gpus
            if found > best:
                best = found
                split = f"{prefills} x {first[2]} and {decodes} x {then[2]} GPUs"
    return best, split


def _apart(prefills: list[Replica], decodes: list[Replica]) -> Serve:
    return lambda arrivals: disaggregated(arrivals, prefills, decodes)


def _prompts_only(replica: Replica) -> Serve:
    def serve(arrivals: Sequence[Arrival]) -> list[Served]:
        first_s = prefill(arrivals, [replica])
        return [Served(f - a.at_s, 0.0) for f, a in zip(first_s, arrivals, strict=True)]

    return serve


def _answers_only(replica: Replica) -> Serve:
    at_once = Replica(Coefficients((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 1), 10**9)
    return lambda arrivals: disaggregated(arrivals, [at_once], [replica])


def advice_row() -> Row:
    """Short prompts, long answers, two GPUs: one would idle."""
    replica = next(r for gpus, r in replicas("facebook/opt-13b", "distserve") if gpus == 1)
    advice = advise(replica, 2, [(32, 400)] * REQUESTS, Slo(1.0, 0.08))
    ok = not advice.disaggregate
    return Row("where phases apart lose: 32 + 400 tokens", "advised against", advice.sentence(), ok)
