"""Proof rows of Splitwise's six designs on the published table of runs and the Azure code trace."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autoscale.placement.splitwise import MachineTimes, times_from_rows
from autoscale.placement.splitwise_designs import Design, Kind, best_split, throughput
from tests.prove.row import Row

DATA = Path(__file__).parents[3] / "shared" / "data"
TABLE = DATA / "splitwise" / "perf_model.csv"
TRACE = DATA / "azure-llm" / "AzureLLMInferenceTrace_code.csv"
MODEL, REQUESTS, H100 = "llama2-70b", 2500, 40
# As their simulator counts them: weights, and keys and values of one token without grouped heads.
WEIGHT_BYTES, KV_BYTES, LAYERS = 135e9, 2 * 8192 * 80 * 2, 80
MACHINE_BYTES, LINK_BYTES_PER_S = 8 * 80 * 2**30, 200e9


class Budget(NamedTuple):
    """Machines for what 40 DGX-H100 cost (USD) or draw (kW), by the published ratios."""

    name: str
    a100: int
    a100_per_h100: float
    capped_per_h100: float


COST = Budget("cost", 86, 4.76 / 2.21, 1.0)
POWER = Budget("power", 70, 44 / 24.8, 44 / 30.8)


def rows() -> Iterator[Row]:
    """The published relations; about two minutes."""
    if not (TABLE.exists() and TRACE.exists()):
        yield Row("Splitwise's table and the Azure trace", "measured", "skipped, data absent", True)
        return
    for budget in (COST, POWER):
        found = designs(budget)
        told = ", ".join(f"{name} {rate:.0f}" for name, rate in found.items())
        split = min(found[name] for name in ("AA", "HH", "HA", "HHcap"))
        ok = split > max(found["A100"], found["H100"]) > 0
        name = f"six designs at equal {budget.name}, requests/s"
        yield Row(name, "all four split ones above both baselines", told, ok)
        if budget is COST:
            best = max(found, key=lambda each: found[each])
            ratio = found["AA"] / found["H100"]
            measured = f"{best} first; {ratio:.2f} x H100"
            target = "AA first; 1.4 x published"
            yield Row("Splitwise-AA at equal cost", target, measured, best == "AA" and ratio > 1.4)
        else:
            ratios = found["AA"] / found["A100"], found["HA"] / found["H100"]
            measured = f"{ratios[0]:.2f} x and {ratios[1]:.2f} x"
            ok = ratios[0] >= 2.15 and ratios[1] >= 1.18
            name = "AA / baseline A100, HA / baseline H100 at equal power"
            yield Row(name, ">= 2.15 x, >= 1.18 x (published)", measured, ok)


def designs(budget: Budget) -> dict[str, float]:
    """Requests per second within the limits, each design at its best split."""
    a100, h100, capped = (Kind(_times(name), _kv()) for name in ("a100", "h100", "h100-pcap"))
    lengths, reference = _lengths(), a100.times

    def measured(design: Design) -> float:
        hidden = KV_BYTES / LINK_BYTES_PER_S / LAYERS  # all but the last layer's
        return throughput(design, lengths, reference, most=320.0, transfer_s=hidden)

    def best(splits: Sequence[Design]) -> float:
        return best_split(splits, measured)[1]

    many = range(4, H100 - 2)
    a100s, capped_s = (
        [int((H100 - p) * ratio) for p in many]
        for ratio in (budget.a100_per_h100, budget.capped_per_h100)
    )
    half = range(5, budget.a100 - 4)
    return {
        "A100": measured(Design("A100", mixed=(a100, budget.a100))),
        "H100": measured(Design("H100", mixed=(h100, H100))),
        "AA": best([Design("AA", (a100, p), (a100, budget.a100 - p)) for p in half]),
        "HH": best([Design("HH", (h100, p), (h100, H100 - p)) for p in many]),
        "HA": best([Design("HA", (h100, p), (a100, n)) for p, n in zip(many, a100s, strict=True)]),
        "HHcap": best(
            [Design("HHcap", (h100, p), (capped, n)) for p, n in zip(many, capped_s, strict=True)]
        ),
    }


def _kv() -> int:
    return int((MACHINE_BYTES - WEIGHT_BYTES) / KV_BYTES)


def _times(short: str) -> MachineTimes:
    hardware = {"a100": "a100-80gb", "h100": "h100-80gb", "h100-pcap": "h100-80gb-pcap"}[short]
    with TABLE.open(encoding="utf-8") as file:
        return times_from_rows(csv.DictReader(file), MODEL, hardware, 8)


def _lengths() -> list[tuple[int, int]]:
    with TRACE.open(encoding="utf-8") as file:
        trace = [
            (int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)
        ]
    drawn = np.random.default_rng(0).choice(len(trace), REQUESTS)
    return [trace[n] for n in drawn]
