"""Bamboo: a worker killed in the middle of a step changes no bit of what follows."""

from pathlib import Path

import pytest

from tests.train.parallel import plain
from tests.train.processes import Crew
from tests.train.resilience.bamboo_workers import (
    SAMPLES,
    Death,
    begin,
    changed,
    opened,
    refused,
    save,
    steps,
    watch_opens,
)
from tests.train.resilience.varuna_workers import resume
from train.parallel.pipeline_layout import Span, even_spans, grid
from train.parallel.pipeline_trainer import LayersLost
from train.resilience.bamboo import full_cover, take_over

LAYOUT = grid(even_spans(8, 4), 1, SAMPLES, 2)
UNTIL = 5


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Without a loss, and without redundancy."""
    with Crew(4) as crew:
        crew.values(begin, LAYOUT, "plain")
        losses: list[float] = crew.values(steps, UNTIL, [])[0]
        crew.values(begin, LAYOUT)
        assert crew.values(steps, UNTIL, [])[0] == losses
    assert losses == pytest.approx(plain.train(UNTIL, SAMPLES).losses, abs=1e-12)
    return losses


def killed(crew: Crew, death: Death, kind: str = "bamboo") -> int:
    """Trains until a death, and takes over; forward passes that were there already."""
    crew.values(begin, LAYOUT, kind)
    answers = crew.call(steps, UNTIL, [death])
    kinds = [answer.kind for answer in answers.values()]
    assert kinds == ["dead" if n == death.rank else "changed" for n in range(4)]
    crew.gather()
    return sum(crew.values(changed, frozenset({death.rank})))


DEATHS = {
    "stage 2, backward": Death(3, 2, "backward", 2),
    "stage 0": Death(3, 0, "backward", 1),
    "the last": Death(3, 3, "forward", 3),
    "first act": Death(2, 1, "forward", 0),
    "loss told": Death(3, 1, "loss"),
    "updated": Death(3, 2, "update"),
}


SLOW = ("the last", "first act", "updated")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in DEATHS]
)
def test_one_killed(name: str, expected: list[float]):
    with Crew(4) as crew:
        pids = crew.pids
        killed(crew, DEATHS[name])
        for losses in crew.values(steps, UNTIL, []):
            assert losses == expected
        assert crew.pids == {n: pid for n, pid in pids.items() if n != DEATHS[name].rank}


def test_without_updates_of_copies_bits_change(expected: list[float]):
    with Crew(4) as crew:
        killed(crew, DEATHS["stage 2, backward"], "stale")
        losses = crew.values(steps, UNTIL, [])[0]
        assert losses[:2] == expected[:2]
        assert losses[2:] != expected[2:]


def test_forward_passes_were_done_while_waiting(expected: list[float]):
    """And without it they are not there when they are needed, which costs time and no bit."""
    death = DEATHS["stage 2, backward"]
    with Crew(4) as crew:
        assert killed(crew, death) >= 1  # of the 3 or more that stage 2 itself had done
    with Crew(4) as crew:
        assert killed(crew, death, "lazy") == 0
        assert crew.values(steps, UNTIL, [])[0] == expected


def test_one_after_another_down_to_one(expected: list[float]):
    """Each time the copies are made anew first."""
    with Crew(4) as crew:
        crew.values(begin, LAYOUT)
        for deaths in ([Death(2, 1, "backward", 0)], [Death(3, 2, "loss")], [Death(5, 0, "loss")]):
            crew.call(steps, UNTIL, deaths)
            crew.gather()
            crew.values(changed, frozenset({deaths[0].rank}))
        assert len(crew.members) == 1
        assert crew.values(steps, UNTIL, [])[0] == expected


def test_no_checkpoint_is_read_and_two_neighbours_need_one(expected: list[float], tmp_path: Path):
    with Crew(4) as crew:
        crew.values(begin, LAYOUT)
        crew.values(steps, 1, [])
        crew.values(save, str(tmp_path))
        crew.values(watch_opens, str(tmp_path))
        crew.call(steps, UNTIL, [Death(3, 2, "backward", 2)])
        crew.gather()
        crew.values(changed, frozenset({2}))
        assert crew.values(steps, 4, [])[0] == expected[:4]
        assert crew.values(opened) == [0, 0, 0]
        crew.kill(*crew.members[:2])
        crew.gather()
        lost = "layers 2, 3, 4, 5 are lost: stage 0 (rank 0) and stage 1 (rank 1) went"
        assert crew.values(refused, frozenset({0, 1})) == [f"{lost} with the copies of them"]
        crew.hire(1)
        crew.gather()  # falls back: two stages, from the checkpoint of step 1
        two = grid(even_spans(8, 2), 1, SAMPLES, 2)
        assert crew.values(resume, two, str(tmp_path), 99) == [1, 1]
        assert crew.values(opened)[0] > 0  # the count does see a read
        assert crew.values(steps, UNTIL, [])[0] == expected[1:]


def test_two_chains():
    """Gradients cross chains, copies stay in theirs; one of each is lost, one after another."""
    layout = grid(even_spans(8, 2), 2, SAMPLES, 2)
    with Crew(4) as crew:
        crew.values(begin, layout)
        undisturbed = crew.values(steps, UNTIL, [])[0]
        crew.values(begin, layout)
        for death in (Death(2, 1, "backward", 1), Death(4, 1, "forward", 2)):
            crew.call(steps, UNTIL, [death])
            crew.gather()
            crew.values(changed, frozenset({death.rank}))
        assert len(crew.members) == 2
        assert crew.values(steps, UNTIL, [])[0] == undisturbed


def test_every_set_of_losses():
    """Recoverable exactly where no two neighbours in the ring went, as long as one is left."""
    for stages in range(2, 7):
        layout = grid(even_spans(12, stages), 1, 12, 2)
        for chosen in range(1, 2**stages):
            lost = frozenset(n for n in range(stages) if chosen >> n & 1)
            adjacent = any((n + 1) % stages in lost for n in lost)
            if adjacent:
                with pytest.raises(LayersLost):
                    take_over(layout, full_cover(layout), lost, stages)
                continue
            taken = take_over(layout, full_cover(layout), lost, stages)
            left = taken.layout.chains[0].stages
            assert [stage.rank for stage in left] == list(range(stages - len(lost)))
            spans = [span for stage in left for span in stage.spans]
            assert spans == list(even_spans(12, stages))
            assert {move.layer for move in taken.moves} <= set(range(*Span(*spans[0])))
            assert bool(taken.moves) == (0 in lost and stages > 2)
