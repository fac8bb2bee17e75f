"""Random drains, and their optimum by trying every combination of what may be done."""

import math
import random
from typing import NamedTuple

import numpy as np

from serve.migrate.plan import Carried, Movable, Plan, Terms

LOST_SHARE = {"int8": 0.01, "int4": 0.1}


class Drain(NamedTuple):
    """What `plan` is asked."""

    sequences: list[Movable]
    terms: Terms
    deadline_s: float


def random_drain(rng: random.Random, most: int = 8, lossy: bool = True) -> Drain:
    """Up to `most` sequences under a deadline that is sometimes slack, mostly tight, often zero
    for some; bytes as a cache of 2 or 0.5 kB to 130 kB a token has them."""
    token_bytes = rng.choice([512, 2_048, 23_040, 131_072])
    rate = rng.choice([200.0, 2_000.0, 20_000.0])
    sequences = [
        _random_movable(rng, f"s{n}", token_bytes, lossy) for n in range(rng.randint(1, most))
    ]
    terms = Terms(
        link_bytes_per_s=10 ** rng.uniform(6, 10),
        move_s=rng.choice([0.0, 0.001, 0.05]),
        prefill_tokens_per_s=rate,
        codec_bytes_per_s=rng.choice([1e8, 1e9]),
    )
    whole_s = sum(link_s(s, "pages", terms) for s in sequences if s.carried_bytes)
    return Drain(sequences, terms, rng.choice([0.0, rng.uniform(0, 1.5) * whole_s, whole_s]))


def _random_movable(rng: random.Random, name: str, token_bytes: int, lossy: bool) -> Movable:
    tokens = rng.choice([rng.randint(1, 50), rng.randint(50, 8_000)])
    carried: dict[Carried, int] = {"pages": tokens * token_bytes} if rng.random() < 0.95 else {}
    if lossy and carried and rng.random() < 0.8:
        carried["int8"] = carried["pages"] * 34 // 64
        carried["int4"] = carried["pages"] * 9 // 32
    if carried and rng.random() < 0.2:
        carried["kept"] = carried["pages"] * rng.randint(1, 9) // 10
    work = tokens * (1 + tokens / rng.choice([1e9, 4_000.0]))
    return Movable(name, work, rng.randint(1, 2_000), rng.choice([1.0, 20.0, 400.0]), carried)


def link_s(sequence: Movable, choice: Carried, terms: Terms) -> float:
    """Of the link, for one sequence."""
    return terms.move_s + sequence.carried_bytes[choice] / terms.link_bytes_per_s


def brute_force_s(drain: Drain) -> float:
    """The least cost of all combinations that keep the deadline."""
    sequences, terms, deadline_s = drain
    links = costs = np.zeros(1)
    for sequence in sequences:
        pairs = np.array(_pairs(sequence, terms, deadline_s))
        links = np.add.outer(links, pairs[:, 0]).ravel()
        costs = np.add.outer(costs, pairs[:, 1]).ravel()
    return float(costs[links <= deadline_s].min())


def _pairs(sequence: Movable, terms: Terms, deadline_s: float) -> list[tuple[float, float]]:
    """(seconds of the link, seconds of compute spent again) of each way out."""
    pairs = [(0.0, sequence.recompute_tokens / terms.prefill_tokens_per_s)]
    if sequence.remaining_tokens / sequence.decode_tokens_per_s <= deadline_s:
        pairs.append((0.0, 0.0))
    for choice in sequence.carried_bytes:
        pairs.append((link_s(sequence, choice, terms), loss_s(sequence, choice, terms)))
    return pairs


def loss_s(sequence: Movable, choice: str, terms: Terms) -> float:
    """Of compute: packing and unpacking, and a share of the work for the bits that are lost."""
    if choice not in LOST_SHARE:
        return 0.0
    codec_s = sequence.carried_bytes["pages"] / terms.codec_bytes_per_s
    again_s = sequence.recompute_tokens / terms.prefill_tokens_per_s
    return codec_s + LOST_SHARE[choice] * again_s


def problems(drain: Drain, made: Plan) -> list[str]:
    """What is wrong with a plan, computed from the drain alone."""
    sequences, terms, deadline_s = drain
    by_id = {s.request_id: s for s in sequences}
    found = []
    if sorted(s.request_id for s in made.steps) != sorted(by_id):
        found.append("not one step for each sequence")
    total_link_s = total_cost_s = 0.0
    for step in sorted(made.steps, key=lambda s: int(s.request_id[1:])):
        sequence = by_id[step.request_id]
        again_s = sequence.recompute_tokens / terms.prefill_tokens_per_s
        if step.choice == "replay":
            total_cost_s += again_s
        elif step.choice == "finish":
            if sequence.remaining_tokens / sequence.decode_tokens_per_s > deadline_s:
                found.append(f"{step.request_id} cannot finish in time")
        else:
            total_link_s += link_s(sequence, step.choice, terms)
            total_cost_s += loss_s(sequence, step.choice, terms)
    if total_link_s > deadline_s:
        found.append(f"the link is busy for {total_link_s} of {deadline_s} s")
    if not math.isclose(total_link_s, made.link_s, rel_tol=1e-9, abs_tol=1e-12):
        found.append("link_s is not what the steps take")
    if not math.isclose(total_cost_s, made.cost_s, rel_tol=1e-9, abs_tol=1e-12):
        found.append("cost_s is not what the steps cost")
    return found
