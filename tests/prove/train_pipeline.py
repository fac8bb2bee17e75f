"""Proof rows of the pipeline and of what outlives losses in it: against one process, twenty kills
each of Bamboo and Oobleck at seeded moments, Varuna's morphs, its simulator against real steps."""

import random
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.prove.row import Row
from tests.prove.suites import Suite, run
from tests.train.parallel import plain
from tests.train.parallel.test_pipeline import LAYOUTS, follow
from tests.train.parallel.test_pipeline import STEPS as COMPARED
from tests.train.processes import Crew
from tests.train.resilience import oobleck_workers, varuna_workers
from tests.train.resilience.bamboo_workers import (
    SAMPLES,
    Death,
    begin,
    changed,
    opened,
    save,
    steps,
    watch_opens,
)
from train.parallel.pipeline_layout import even_spans, grid
from train.resilience.varuna_simulator import step_seconds

KILLS = 20
UNTIL = 5
FOUR = grid(even_spans(8, 4), 1, SAMPLES, 2)
WAITS_S = [0.01, 0.04, 0.04, 0.06, 0.04, 0.04, 0.03, 0.01]
FORMS = ((2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 4))


def rows(kills: int = KILLS) -> Iterator[Row]:
    """Every row of this module; about six minutes."""
    yield from one_process()
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    yield from bamboo(random.Random(seed), kills, seed)
    yield from oobleck(random.Random(seed), kills, seed)
    yield simulator()
    folder = "tests/train/resilience"
    yield run(Suite("Bamboo: neighbours, no copies, chains", (f"{folder}/test_bamboo.py",)))
    yield run(Suite("Oobleck: cut = brute force, every N to 40", (f"{folder}/test_templates.py",)))
    yield run(Suite("Varuna: 4x1 -> 2x2 -> 3x1 by SIGKILL", (f"{folder}/test_varuna.py",)))
    yield run(
        Suite(
            "Varuna: choice within 6 % of every (P, D, cut)",
            (f"{folder}/test_varuna_simulator.py",),
        )
    )


def one_process() -> Iterator[Row]:
    """Losses and gradients of every layout against plain torch."""
    with Crew(4) as crew:
        answers = crew.values(follow)
    expected = plain.train(COMPARED, SAMPLES)
    loss = gradient = 0.0
    for name, layout in LAYOUTS.items():
        for rank, answer in enumerate(answer[name] for answer in answers):
            told = np.abs(np.subtract(answer["losses"], expected.losses))
            loss = max(loss, float(told.max()))
            place = layout.place(rank)
            layers = len(layout.stage(place).layers) if place else 1
            for n, (layer, values) in enumerate(answer["gradients"]):
                wanted = expected.gradients[n // layers][layer].numpy()
                gradient = max(gradient, float(np.abs(values - wanted).max()))
    forms = ", ".join(LAYOUTS)
    yield Row(f"1F1B ({forms}): losses", "1e-12 of one process", f"{loss:.1e}", loss <= 1e-12)
    yield Row("1F1B: gradients", "1e-12 of one process", f"{gradient:.1e}", gradient <= 1e-12)


def moment(rng: random.Random, ranks: int, micros: int) -> Death:
    kind = rng.choice(["forward", "backward", "backward", "loss", "update"])
    return Death(rng.randint(2, UNTIL - 1), rng.randrange(ranks), kind, rng.randrange(micros))


def after_a_death(crew: Crew, death: Death, change: Any) -> tuple[list[float], bool]:
    """The losses of a run that lost one, and whether the others are the same processes."""
    pids = crew.pids
    crew.call(steps, UNTIL, [death])
    assert len(crew.members) == len(pids) - 1
    crew.gather()
    crew.values(change, frozenset({death.rank}))
    losses: list[float] = crew.values(steps, UNTIL, [])[0]
    return losses, crew.pids == {n: pid for n, pid in pids.items() if n != death.rank}


def bamboo(rng: random.Random, kills: int, seed: int) -> Iterator[Row]:
    """Kills of any stage at any act."""
    with Crew(4) as crew:
        crew.values(begin, FOUR, "plain")
        expected = crew.values(steps, UNTIL, [])[0]
    equal = kept = reads = 0
    for _ in range(kills):
        death = moment(rng, 4, 6)
        with Crew(4) as crew, tempfile.TemporaryDirectory() as folder:
            crew.values(begin, FOUR)
            crew.values(steps, 1, [])
            crew.values(save, folder)
            crew.values(watch_opens, folder)
            losses, same = after_a_death(crew, death, changed)
            equal, kept = equal + (losses == expected), kept + same
            reads += sum(crew.values(opened))
    check = f"Bamboo, 4 stages, {kills} x kill -9 (seed {seed})"
    yield Row(f"{check}: loss curve", "bit-equal", f"{equal} of {kills}", equal == kills)
    yield Row(f"{check}: survivors", "same PIDs", f"{kept} of {kills}", kept == kills)
    yield Row(f"{check}: checkpoint reads", "0", str(reads), reads == 0)


def oobleck(rng: random.Random, kills: int, seed: int) -> Iterator[Row]:
    """Kills of any of five, as 3 + 2."""
    expected = plain.train(UNTIL, SAMPLES).losses
    shapes, worst, kept = set(), 0.0, 0
    for _ in range(kills):
        death = moment(rng, 5, 2)
        with Crew(5) as crew:
            before = crew.values(oobleck_workers.begin)[0]
            losses, same = after_a_death(crew, death, oobleck_workers.changed)
            after = crew.values(sizes)[0]
        shapes.add(f"{'+'.join(map(str, before))} -> {'+'.join(map(str, after))}")
        worst = max(worst, float(np.abs(np.subtract(losses, expected)).max()))
        kept += same
    check = f"Oobleck, 5 workers, {kills} x kill -9 (seed {seed})"
    yield Row(f"{check}: pipelines", "3+2 -> 2+2", "; ".join(shapes), shapes == {"3+2 -> 2+2"})
    yield Row(f"{check}: loss curve", "1e-9 of one process", f"{worst:.1e}", worst <= 1e-9)
    yield Row(f"{check}: survivors", "same PIDs", f"{kept} of {kills}", kept == kills)
    suite = Suite("Oobleck: bits of a fresh 2+2 run", ("tests/train/resilience/test_oobleck.py",))
    yield run(suite)


def sizes(kept: dict[str, Any], world: Any) -> list[int]:
    return [len(chain.stages) for chain in kept["trainer"].layout.chains]


def simulator() -> Row:
    """Steps of two to four real processes, whose layers wait rather than compute so that a busy
    machine does not count, against the simulator calibrated on one of them."""
    errors = {}
    with Crew(4) as crew:
        costs = crew.values(varuna_workers.calibrate, WAITS_S, 2)[0]
        for stages, chains in FORMS:
            layout = grid(even_spans(8, stages), chains, SAMPLES, 2)
            taken = crew.values(varuna_workers.timed, WAITS_S, layout, 3)[0]
            error = step_seconds(costs, layout) / statistics.median(taken) - 1
            errors[f"{stages}x{chains}"] = error
    told = ", ".join(f"{form} {error:+.1%}" for form, error in errors.items())
    worst = max(map(abs, errors.values()))
    return Row("Varuna's simulator against real steps", "within 10 %", told, worst < 0.10)
