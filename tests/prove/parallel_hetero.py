"""Proof rows of workers of unlike speed: HetPipe's bound on real workers, what it is worth where
one is throttled, what it costs in loss; AMP's search against all there is; and what `--advise` puts
first against what a few forms really take."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.prove.row import Row
from tests.prove.suites import Suite, run
from tests.train.advise import test_amp
from tests.train.heterogeneous import hetpipe_ranks as ranks
from tests.train.heterogeneous import test_hetpipe, test_hetpipe_speed
from tests.train.processes import on_ranks
from tests.train.quota import NoQuota
from train.advise.machines import machines_of
from train.advise.ranking import Advised, advise
from train.job import Job
from train.rehearsal import rehearse
from train.weights import read_start

FOLDER = "tests/train/heterogeneous/test_hetpipe.py"
ROUNDS = 2
SUITES = (
    Suite(
        "HetPipe, bound 0: bulk-synchronous SGD, momentum and AdamW, fp64 1e-12",
        (f"{FOLDER}::test_bound_0_is_bulk_synchronous",),
    ),
    Suite(
        "HetPipe, chains in flight: weights of one process with the same delays, fp64 1e-12",
        (f"{FOLDER}::test_chains_compute_with_the_weights_that_they_may_have",)
        + (f"{FOLDER}::test_chains_are_as_far_apart_as_the_bound_lets_them",),
    ),
    Suite(
        "HetPipe, a server that keeps no bound is noticed; bytes are the wire's",
        (f"{FOLDER}::test_a_bound_that_nobody_keeps_is_noticed",)
        + (f"{FOLDER}::test_bytes_are_those_of_the_wire",),
    ),
    Suite(
        "HetPipe in a job: checkpoints, stops, real workers",
        ("tests/train/heterogeneous/test_hetpipe_job.py",),
        slow=True,
    ),
    Suite(
        "HetPipe in a job, 2 chains of 2 stages: bound 0 is dp x pp in fp64; bound 1; checkpoints",
        ("tests/train/heterogeneous/test_hetpipe_pipeline.py",),
    ),
    Suite("--advise: forms are jobs, costs by hand, refusals", ("tests/train/advise",)),
)


def rows() -> Iterator[Row]:
    """Every row of this module; about six minutes."""
    for suite in SUITES:
        yield run(suite)
    yield from staleness()
    yield from speed()
    yield from loss()
    yield amp()
    yield first_is_fastest()


def staleness() -> Iterator[Row]:
    """As the servers saw it, with one slow worker of three."""
    for bound in (0, 1, 4):
        answers = on_ranks(3, ranks.trained, ranks.job(bound, steps=14), 0.0, bound)
        seen = [stale for answer in answers for stale in answer["stale"]]
        check = f"HetPipe: waves ahead of the servers' clock, bound {bound}"
        measured = f"{min(seen)} to {max(seen)} in {len(seen)} reads"
        yield Row(check, f"reaches {bound}, never more", measured, max(seen) == bound)


def speed() -> Iterator[Row]:
    """Over workers that sum their gradients after each step, under the same quotas of processor
    time; four minutes."""
    slow = "HetPipe, one of 4 with half of the processor time"
    for throttle, shares, bound, said, wins in (
        ("in turns", "equal", 6, "each in its turn", True),
        ("stays", "measured", 4, "one stays, waves by speed", True),
        ("stays", "equal", 4, "one stays, equal waves: the bound alone wins nothing", False),
    ):
        check = f"{slow} ({said}): steps over bulk-synchronous"
        target = ">= 1.50 x" if wins else "<= 1.20 x"
        try:
            made = test_hetpipe_speed.found(throttle, shares, bound)
        except NoQuota as error:
            yield Row(check, target, str(error), False)
            continue
        measured = f"{made.ratio:.2f} x; at most {made.stale} of {bound} steps ahead"
        enough = made.ratio >= 1.5 if wins else made.ratio <= 1.2
        yield Row(check, target, measured, enough and made.stale <= bound)


def loss() -> Iterator[Row]:
    """After the same samples, with one slow worker: as HetPipe has it, and with AdamW, whose own
    updates nobody knows before a server has made them."""
    for name, bound in (("sgd", 4), ("adamw", 1)):
        apart, together = test_hetpipe.learnt(name, bound)
        check = f"HetPipe, {name}, bound {bound}: loss after the same samples as together"
        measured = f"{apart / together - 1:+.1%}: {apart:.3f} and {together:.3f}"
        yield Row(check, "at most 5 % more", measured, apart <= 1.05 * together)


def amp() -> Row:
    """On random problems of up to five devices."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    missed, count = test_amp.wrong(seed), test_amp.PROBLEMS
    check = "AMP: stages and devices as fast as the best of all there are"
    measured = f"{count - missed} of {count} random problems (seed {seed})"
    return Row(check, f"all {count}", measured, missed == 0)


FORMS: tuple[dict[str, object], ...] = (
    {"mesh.tensor": 2},
    {"pipeline.stages": 2},
    {},
)


def chosen(ranked: tuple[Advised, ...]) -> list[Advised]:
    """The first, and the best of each unlike kind behind it; of the plain kind the one with the
    smallest micro-batches."""
    found = [ranked[0]]
    for form in FORMS:
        alike = [
            advised
            for advised in ranked
            if {k: v for k, v in advised.settings.items() if k != "run.micro_batch_tokens"} == form
        ]
        if alike:
            found.append(alike[0] if form else min(alike, key=lambda a: a.job.micro_samples))
    return found


def first_is_fastest() -> Row:
    """Real steps of some forms on this machine, in turns."""
    wanted = Job.model_validate(
        {
            "model": {"layers": 4, "tied_head": False},
            "run": {"tokens": 2048 * 20, "batch_tokens": 2048},
            "precision": {"compute": "float32"},
            "workers": {"count": 2, "threads": 1},
        }
    )
    start = read_start(wanted)
    forms = chosen(advise(wanted, start, machines_of(wanted, start)).ranked)
    took = {place: float("inf") for place in range(len(forms))}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for place, form in enumerate(forms):
                made = form.job.model_copy(update={"folder": Path(folder)})
                took[place] = min(took[place], rehearse(made, start).step_s)
    for place, form in enumerate(forms):
        print(f"{form.settings}: {form.step_s * 1e3:.0f} ms said, {took[place] * 1e3:.0f} measured")
    ratio = took[0] / min(took.values())
    check = f"--advise: its first against the fastest of {len(forms)} measured forms"
    measured = f"{ratio:.3f} x, {took[0] / forms[0].step_s:.2f} x the estimate"
    return Row(check, "<= 1.10 x", measured, ratio <= 1.10)
