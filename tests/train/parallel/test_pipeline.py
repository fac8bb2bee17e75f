"""The 1F1B pipeline against one process and plain torch; its order, its memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.parallel import plain, tiny
from tests.train.processes import Crew
from train.parallel.pipeline import Act, is_forward_next
from train.parallel.pipeline_layers import AdamW, HeldLayers
from train.parallel.pipeline_layout import Chain, Layout, Span, Stage, even_spans, grid
from train.parallel.pipeline_trainer import PipelineTrainer, Training
from train.world import World

SAMPLES, STEPS = 12, 4
LAYOUTS = {
    "1x1": grid(even_spans(8, 1), 1, SAMPLES, 5),
    "4x1": grid(even_spans(8, 4), 1, SAMPLES, 2),
    "2x2": grid(even_spans(8, 2), 2, SAMPLES, 2),
    "3+1, shares unlike": Layout(
        (
            Chain(
                (Stage(3, (Span(0, 3),)), Stage(0, (Span(3, 4),)), Stage(2, (Span(4, 8),))), 0, 7
            ),
            Chain((Stage(1, (Span(0, 8),)),), 7, 5),
        ),
        8,
        2,
    ),
}


def follow(kept: dict[str, Any], world: World) -> dict[str, Any]:
    """Trains a few steps in every layout, one after another; what the tests compare. Ranks that a
    layout does not use are spares."""
    return {name: follow_one(world, layout) for name, layout in LAYOUTS.items()}


def follow_one(world: World, layout: Layout) -> dict[str, Any]:
    acts: list[Act] = []
    training = Training(
        tiny.model(), tiny.batches, AdamW(lambda _: 0.01), 1 / (SAMPLES * tiny.TOKENS), acts.append
    )
    trainer = PipelineTrainer(training, layout, world.rank)
    gradients: list[tuple[int, Any]] = []
    apply = trainer.held.apply

    def telling(layer: int, gradient: torch.Tensor, step: int) -> None:
        gradients.append((layer, gradient.numpy().copy()))
        apply(layer, gradient, step)

    trainer.held.apply = telling  # type: ignore[method-assign]
    losses = [trainer.step(world) for _ in range(STEPS)]
    weights = {
        name.removeprefix("param/"): tensor.numpy()
        for layer in trainer.held.modules
        for name, tensor in trainer.held.tensors(layer).items()
        if name.startswith("param/")
    }
    flight = [0]
    for act in acts:
        flight.append(flight[-1] + {"forward": 1, "backward": -1}[act.kind])
    return {"losses": losses, "weights": weights, "most": max(flight), "gradients": gradients}


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    with Crew(4) as crew:
        return crew.values(follow)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name: str, answers: list[dict[str, Any]]):
    layout = LAYOUTS[name]
    expected = plain.train(STEPS, SAMPLES)
    assert expected.losses[-1] < expected.losses[0]
    seen: set[str] = set()
    for rank in range(4):
        answer = answers[rank][name]
        assert answer["losses"] == pytest.approx(expected.losses, abs=1e-12)
        for weight, values in answer["weights"].items():
            torch.testing.assert_close(
                torch.tensor(values), expected.weights[weight], rtol=0, atol=1e-12
            )
        place = layout.place(rank)
        layers = len(layout.stage(place).layers) if place else 0
        assert len(answer["gradients"]) == layers * STEPS
        for n, (layer, gradient) in enumerate(answer["gradients"]):
            wanted = expected.gradients[n // layers][layer]
            torch.testing.assert_close(torch.tensor(gradient), wanted, rtol=0, atol=1e-12)
        seen |= set(answer["weights"])
    assert seen == set(expected.weights)


@pytest.mark.parametrize("name", LAYOUTS)
def test_keeps_no_more_micro_batches_than_stages_follow(name: str, answers: list[dict[str, Any]]):
    layout = LAYOUTS[name]
    for chain in layout.chains:
        micros = len(chain.micros(layout.micro_samples))  # what GPipe would keep
        for p, stage in enumerate(chain.stages):
            assert answers[stage.rank][name]["most"] == min(len(chain.stages) - p, micros)


@given(st.integers(1, 6), st.integers(1, 12))
def test_the_rule_never_waits_for_itself(stages: int, micros: int):
    """Every stage follows the rule; whoever has what it needs acts. All finish, whether the first
    that can acts first or the last."""
    for order in (range(stages), range(stages - 1, -1, -1)):
        forwards, backwards = [0] * stages, [0] * stages
        while backwards[0] < micros:
            for s in order:
                if backwards[s] == micros:
                    continue
                if is_forward_next(forwards[s], backwards[s], micros, stages - s):
                    if s == 0 or forwards[s - 1] > forwards[s]:
                        forwards[s] += 1
                        break
                elif s == stages - 1 or backwards[s + 1] > backwards[s]:
                    assert forwards[s] > backwards[s]
                    backwards[s] += 1
                    break
            else:
                pytest.fail(f"nobody can act: {forwards}, {backwards}")


BAD = {
    "a gap": (((0, 2), (3, 8)), 12),
    "too short": (((0, 2), (2, 7)), 12),
    "an empty stage": (((0, 8), (8, 8)), 12),
    "no samples": (((0, 4), (4, 8)), 0),
}


@pytest.mark.parametrize("name", BAD)
def test_layouts_that_cannot_be_are_refused(name: str):
    spans, samples = BAD[name]
    stages = tuple(Stage(n, (Span(*span),)) for n, span in enumerate(spans))
    with pytest.raises(ValueError):
        Layout((Chain(stages, 0, samples),), 8, 2)


def test_shared_weights_are_refused():
    shared = torch.nn.Linear(4, 4, dtype=torch.float64)
    model = replace(tiny.model(), build=lambda layer: shared)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        HeldLayers(model, AdamW()).build([0, 1])
