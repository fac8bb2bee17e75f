"""Oobleck: pipelines of two and three workers lose one and go on as two and two."""

import pytest

from tests.train.parallel import plain, tiny
from tests.train.processes import Crew
from tests.train.resilience.bamboo_workers import SAMPLES, Death, refused, steps
from tests.train.resilience.oobleck_workers import MICRO_SAMPLES, PLANNER, begin, changed, fresh
from train.parallel.pipeline_layers import AdamW, HeldLayers
from train.parallel.pipeline_layout import survivors
from train.resilience.oobleck import first_layout

UNTIL = 5


def layer_bytes(layer: int) -> int:
    """Of a layer's whole state."""
    held = HeldLayers(tiny.model(), AdamW())
    held.build([layer])
    return 3 * 8 * held.numel(layer)


DEATHS = {
    "of the three": Death(3, 1, "backward", 1),
    "of the two, which borrow": Death(3, 4, "forward", 2),
    "after its update": Death(3, 2, "update"),
}


SLOW = ("of the three", "after its update")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in DEATHS]
)
def test_2_and_3_become_2_and_2(name: str):
    death = DEATHS[name]
    finished = death.step if death.kind == "update" else death.step - 1
    with Crew(5) as crew:
        pids = crew.pids
        assert crew.values(begin)[0] == [3, 2]
        answers = crew.call(steps, UNTIL, [death])
        assert [n for n, answer in answers.items() if answer.kind == "dead"] == [death.rank]
        crew.gather()
        after = crew.values(changed, frozenset({death.rank}))
        layout = after[0]["layout"]
        assert [len(chain.stages) for chain in layout.chains] == [2, 2]
        assert all(a["layout"] == layout and a["steps"] == finished for a in after)
        losses = crew.values(steps, UNTIL, [])[0]
        assert crew.pids == {n: pid for n, pid in pids.items() if n != death.rank}
    # Only what was missing moved: each new holder's layers less those that it had before.
    before = first_layout(PLANNER, 5, SAMPLES, MICRO_SAMPLES)
    ranks = survivors(5, frozenset({death.rank}))
    had = {ranks[old]: [n for n in range(8) if old in before.holders(n)] for old in ranks}
    lacking = [n for new in had for n in range(8) if new in layout.holders(n) and n not in had[new]]
    assert sum(a["bytes"] for a in after) == sum(layer_bytes(n) for n in lacking) > 0
    # A fresh run in the new layout from the same step has the same bits.
    state = {n: flat for a in after for n, flat in a["state"].items()}
    with Crew(4) as crew:
        crew.values(fresh, layout, finished, state)
        assert crew.values(steps, UNTIL, [])[0] == losses[finished:]
    assert losses == pytest.approx(plain.train(UNTIL, SAMPLES).losses, abs=1e-9)


def test_without_fetching_the_curve_breaks():
    death = DEATHS["of the three"]
    with Crew(5) as crew:
        crew.values(begin, True)
        crew.call(steps, UNTIL, [death])
        crew.gather()
        crew.values(changed, frozenset({death.rank}))
        losses = crew.values(steps, UNTIL, [])[0]
    expected = plain.train(UNTIL, SAMPLES).losses
    assert losses[: death.step - 1] == pytest.approx(expected[: death.step - 1], abs=1e-9)
    assert abs(losses[death.step - 1] - expected[death.step - 1]) > 1e-3


def test_every_layer_of_two_pipelines_lost():
    with Crew(4) as crew:
        assert crew.values(begin)[0] == [2, 2]
        crew.values(steps, 2, [])
        crew.kill(0, 2)
        crew.gather()
        refusals = crew.values(refused, frozenset({0, 2}))
        message = "layers 0, 1, 2, 3 are lost: every pipeline lost the worker that held them"
        assert set(refusals) == {message}
