"""Bamboo: a worker killed in the middle of a step changes no bit of what follows."""

import pytest

from tests.train.crew import Crew
from tests.train.parallel import plain
from tests.train.resilience.bamboo_workers import SAMPLES, Death, begin, changed, steps, undisturbed
from train.parallel.pipeline_layout import even_spans, grid

LAYOUT = grid(even_spans(8, 4), 1, SAMPLES, 2)
UNTIL = 5


@pytest.fixture(scope="module")
def expected() -> list[float]:
    with Crew(4) as crew:
        losses = undisturbed(crew, LAYOUT, UNTIL)
        assert undisturbed(crew, LAYOUT, UNTIL, "plain") == losses
    assert losses == pytest.approx(plain.train(UNTIL, SAMPLES).losses, abs=1e-12)
    return losses


DEATHS = {
    "stage 2, backward": Death(3, 2, "backward", 2),
    "stage 0": Death(3, 0, "backward", 1),
    "the last": Death(3, 3, "forward", 3),
    "first act": Death(2, 1, "forward", 0),
    "loss told": Death(3, 1, "loss"),
    "updated": Death(3, 2, "update"),
}


@pytest.mark.parametrize("name", DEATHS)
def test_one_killed(name: str, expected: list[float]):
    death = DEATHS[name]
    with Crew(4) as crew:
        pids = crew.pids
        crew.values(begin, LAYOUT)
        answers = crew.call(steps, UNTIL, [death])
        kinds = [answer.kind for answer in answers.values()]
        assert kinds == ["dead" if n == death.rank else "changed" for n in range(4)]
        crew.gather()
        crew.values(changed, frozenset({death.rank}))
        for losses in crew.values(steps, UNTIL, []):
            assert losses == expected
        assert crew.pids == {n: pid for n, pid in pids.items() if n != death.rank}
