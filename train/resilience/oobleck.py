"""Training in pipelines of unlike sizes that shrink and go on (Oobleck, SOSP 23).

Every pipeline holds the whole model, so a lost worker's layers are in the others. After a loss each
survivor works out the same new pipelines (`regroup`, `Planner`), fetches the layers it lacks from a
survivor that has them, and the step that was cut short is done again. Nobody restarts, no
checkpoint is read, and the step's samples stay the same.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from train.parallel.pipeline_layout import Chain, Layout, Stage, survivors
from train.parallel.pipeline_trainer import LayersLost, PipelineTrainer, Training, plan_moves
from train.resilience.templates import Plan, Planner, regroup
from train.world import World

Held = dict[int, list[int]]
"""By layer, the ranks that have its state."""


def layout_of(
    plan: Plan, pipelines: Sequence[Sequence[int]], layers: int, samples: int, micro_samples: int
) -> Layout:
    """Pipelines of a plan on given ranks, in the order of the plan's templates; `samples` of a step
    in micro-batches of `micro_samples`, the last of which takes what remains."""
    chains, first = [], 0
    for n, (template, ranks) in enumerate(zip(plan.templates, pipelines, strict=True)):
        share = micro_samples * plan.micros[n]
        if n == len(plan.templates) - 1:
            share = samples - first
        spans = zip(ranks, template.spans, strict=True)
        chains.append(Chain(tuple(Stage(rank, (span,)) for rank, span in spans), first, share))
        first += share
    return Layout(tuple(chains), layers, micro_samples)


def first_layout(planner: Planner, workers: int, samples: int, micro_samples: int) -> Layout:
    """The layout to begin with: ranks in order, the plan's pipelines one after another."""
    plan = planner.plan(workers)
    pipelines, rank = [], 0
    for template in plan.templates:
        pipelines.append(range(rank, rank + len(template.spans)))
        rank += len(template.spans)
    return layout_of(plan, pipelines, len(planner.costs.seconds), samples, micro_samples)


def next_layout(
    planner: Planner, pipelines: Sequence[Sequence[int]], held: Held, before: Layout
) -> Layout:
    """The layout on what is left of the pipelines of `before`, in new ranks, each pipeline's ranks
    on the stages of which they hold most bytes. ValueError where too few are left."""
    groups = regroup(pipelines, planner.fewest, planner.failures)
    plan = planner.of_sizes([min(len(group), max(planner.templates)) for group in groups])
    seated = [
        _seated(planner, group, [range(*span) for span in template.spans], held)
        for group, template in zip(groups, plan.templates, strict=True)
    ]
    return layout_of(plan, seated, before.layers, before.samples, before.micro_samples)


def _seated(
    planner: Planner, ranks: Sequence[int], stages: Sequence[range], held: Held
) -> list[int]:
    """Ranks by stage so that as many bytes as possible stay where they are; a pipeline with more
    ranks than layers leaves some out."""
    size = planner.costs.state_bytes
    kept = np.array(
        [[sum(size[n] for n in s if r in held[n]) for s in stages] for r in sorted(ranks)]
    )
    rows, columns = linear_sum_assignment(kept, maximize=True)
    by_stage = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    return [sorted(ranks)[by_stage[n]] for n in range(len(stages))]


class OobleckTrainer(PipelineTrainer):
    """A worker of such pipelines."""

    def __init__(self, training: Training, planner: Planner, layout: Layout, rank: int) -> None:
        super().__init__(training, layout, rank)
        self.planner = planner
        self._held: Held = {}
        self._pipelines: list[list[int]] = []
        self._take_stock()

    def changed(self, world: World, lost: frozenset[int]) -> None:
        """Goes on in a new world without ranks `lost` of the one before, whose other ranks closed
        up in order. If this raises WorldChanged in its turn, call it again with what was lost then.
        LayersLost where no survivor has a layer, ValueError where too few workers are left."""
        ranks = survivors(world.size + len(lost), lost)
        self._held = {n: [ranks[r] for r in rs if r in ranks] for n, rs in self._held.items()}
        self._pipelines = [[ranks[r] for r in rs if r in ranks] for rs in self._pipelines]
        self.agree(world)
        gone = [n for n, holders in self._held.items() if not holders]
        if gone:
            raise LayersLost(gone, "every pipeline lost the worker that held them")
        layout = next_layout(self.planner, self._pipelines, self._held, self.layout)
        self.move(world, layout, plan_moves(self._held, layout))
        self._take_stock()

    def _take_stock(self) -> None:
        self._held = {n: self.layout.holders(n) for n in range(self.layout.layers)}
        self._pipelines = [[s.rank for s in chain.stages] for chain in self.layout.chains]
