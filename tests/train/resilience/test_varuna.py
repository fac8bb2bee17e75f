"""Varuna: a job of four stages becomes two chains of two, then three stages, each time because a
worker was killed; its curve is that of one process."""

import json
from pathlib import Path

import pytest

from tests.train.parallel import plain, tiny
from tests.train.processes import Crew
from tests.train.resilience.bamboo_workers import SAMPLES, Death, steps
from tests.train.resilience.varuna_workers import asked, resume
from train.parallel.pipeline_layers import AdamW, HeldLayers
from train.parallel.pipeline_layout import Layout, even_spans, grid
from train.resilience.layer_folder import LayerFolder
from train.resilience.varuna_simulator import Measured, choose

UNTIL, EVERY = 9, 2
COSTS = Measured(
    forward_s=(0.01, *(0.1,) * 6, 0.03),
    backward_s=(0.02, *(0.2,) * 6, 0.06),
    update_s=(0.01,) * 8,
    gradient_bytes=(1e3,) * 8,
    state_bytes=(3e3,) * 8,
    boundary_bytes=(1e3,) * 8,
    latency_s=0.001,
    bytes_per_s=1e6,
    memory_bytes=15e3,  # two workers hold the model, one does not
)


def form(layout: Layout) -> str:
    return f"{len(layout.chains[0].stages)}x{len(layout.chains)}"


def test_morphs_through_kills(tmp_path: Path):
    curve: dict[int, float] = {}
    begun: list[int] = []
    forms = [grid(even_spans(8, 4), 1, SAMPLES, 2)]
    with Crew(4) as crew:
        # Begun as four stages; killed in step 4, replaced; killed in step 7, not replaced.
        for death, hired in ((Death(4, 2, "backward", 2), 1), (Death(7, 1, "forward", 1), 0)):
            begun.append(follow(crew, forms[-1], tmp_path, [death], curve))
            crew.hire(hired)
            crew.gather()
            workers = len(crew.members)
            forms.append(choose(COSTS, workers, SAMPLES, 2).layout)
        assert [form(layout) for layout in forms] == ["4x1", "2x2", "3x1"]
        begun.append(follow(crew, forms[-1], tmp_path, [], curve))
    assert begun == [0, 2, 6]  # where the newest checkpoint was
    expected = plain.train(UNTIL, SAMPLES).losses
    assert [curve[n] for n in range(1, UNTIL + 1)] == pytest.approx(expected, abs=1e-9)


def follow(
    crew: Crew, layout: Layout, root: Path, deaths: list[Death], curve: dict[int, float]
) -> int:
    """Resumes in a form and trains until the end or a death; the step that it began at."""
    begun = crew.values(resume, layout, str(root), EVERY)
    assert len(set(begun)) == 1
    answers = crew.call(steps, UNTIL, deaths)
    told = crew.values(asked)
    died = [member for member, answer in answers.items() if answer.kind == "dead"]
    assert len(died) == len(deaths)
    seen = crew.values(losses)[0]
    check_samples([each for one in told for each in one], begun[0], begun[0] + len(seen))
    for number, loss in enumerate(seen, begun[0] + 1):
        assert number not in curve or curve[number] == pytest.approx(loss, abs=1e-9)
        curve[number] = loss
    return int(begun[0])


def losses(kept, world) -> list[float]:
    return list(kept["trainer"].losses.values())


def check_samples(told: list[tuple[int, int, int]], begun: int, finished: int) -> None:
    """Each finished step computed its own 12 samples once each."""
    assert finished > begun
    for step in range(begun, finished):
        ids = [n for s, first, count in told if s == step for n in range(first, first + count)]
        assert sorted(ids) == list(range(step * SAMPLES, (step + 1) * SAMPLES))


def test_a_layer_is_read_alone(tmp_path: Path):
    held = HeldLayers(tiny.model(), AdamW())
    held.build([1, 2])
    folder = LayerFolder(tmp_path)
    for rank, layer in enumerate((1, 2)):
        folder.write(7, rank, held.tensors(layer))
    assert folder.newest() is None  # not committed
    folder.commit(7, 84, 2)
    found = folder.newest()
    assert found is not None and (found.step, found.samples) == (7, 84)
    assert found.read(held.tensors(2)).keys() == held.tensors(2).keys()
    with pytest.raises(KeyError, match="layers.5"):
        found.read(["param/layers.5.norm.weight"])
    assert json.loads((found.path / "manifest.json").read_text())["parts"] == list(found.parts)
