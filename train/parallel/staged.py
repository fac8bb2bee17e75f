"""A model in stages under torch's pipeline schedules: GPipe (Huang et al. 2019), 1F1B (Narayanan et
al. 2019) and interleaved 1F1B (Narayanan et al. 2021), where each rank has several stages far
apart. For workers that stay; for those that come and go there is `pipeline.py`.

Of a step's time a rank idles (p - 1) / (v m + p - 1): p ranks, m micro-batches, v stages a rank.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.nn import functional

from train.model import Llama

Schedule = Literal["gpipe", "1f1b", "interleaved"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class Part(nn.Module):
    """Consecutive layers of a Llama; the first part has the embedding, the last one norm and head.

    Takes ids (batch, tokens) or the stream (batch, tokens, hidden); gives the stream, or logits.
    """

    def __init__(self, model: Llama, layers: range) -> None:
        super().__init__()
        self.first, self.last = layers.start == 0, layers.stop == len(model.model.layers)
        self.layers = nn.ModuleDict({str(n): model.model.layers[n] for n in layers})
        self.embed_tokens = model.model.embed_tokens if self.first else None
        self.norm = model.model.norm if self.last else None
        self.lm_head = model.lm_head if self.last else None
        self._angles = model.angles

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        cos, sin = self._angles(x.shape[1], x.dtype)
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        if self.norm is not None and self.lm_head is not None:
            x = self.lm_head(self.norm(x))
        return x


class Plan(NamedTuple):
    """schedule; micros: micro-batches of a step; stages: of one rank, 1 unless interleaved."""

    schedule: Schedule
    micros: int
    stages: int = 1

    def bubble(self, ranks: int) -> float:
        """The share of a step in which a rank idles, if all stages take equally long."""
        return (ranks - 1) / (self.stages * self.micros + ranks - 1)

    def check(self, ranks: int, layers: int) -> None:
        """ValueError for what does not go together."""
        if self.schedule not in SCHEDULES:
            raise ValueError(f"pipeline.schedule = {self.schedule}: accepted are {SCHEDULES}")
        if (self.stages > 1) != (self.schedule == "interleaved"):
            raise ValueError(
                f"pipeline.schedule = {self.schedule} with {self.stages} stages a rank: "
                "interleaved wants 2 or more, the others 1"
            )
        if layers < ranks * self.stages:
            raise ValueError(
                f"{layers} layers are fewer than {ranks} ranks x {self.stages} stages; at most "
                f"{layers // ranks} stages a rank would be accepted"
            )
        if self.schedule == "interleaved" and self.micros % ranks:
            raise ValueError(
                f"interleaved wants micro-batches, {self.micros}, in multiples of {ranks} ranks"
            )


def ranges(layers: int, stages: int) -> list[range]:
    """Layers of each stage: consecutive, as even as can be, the first ones one more."""
    each, more = divmod(layers, stages)
    starts = [stage * each + min(stage, more) for stage in range(stages + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


class Staged:
    """This rank's stages of a model, and its turns in a step. model: whole, the same on all ranks;
    what this rank has no stage for is not kept by it. Gradients add up in `parameters`."""

    def __init__(self, model: Llama, group: dist.ProcessGroup, plan: Plan, scale: float) -> None:
        layers, ranks = len(model.model.layers), group.size()
        plan.check(ranks, layers)
        self._group, self._plan, self._tied = group, plan, model.config.tied_head
        cuts = ranges(layers, ranks * plan.stages)
        numbers = range(group.rank(), len(cuts), ranks)
        self.parts = {number: Part(model, cuts[number]) for number in numbers}
        self.first, self.last = 0 in self.parts, len(cuts) - 1 in self.parts
        stages: list[Any] = [
            PipelineStage(part, number, len(cuts), torch.device("cpu"), group=group)
            for number, part in self.parts.items()
        ]

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            wide = logits.float() if logits.dtype != torch.float64 else logits
            flat, wanted = wide.flatten(0, 1), targets.flatten()
            return functional.cross_entropy(flat, wanted, reduction="sum") * scale

        more: dict[str, Any] = {"loss_fn": loss, "scale_grads": False}
        if plan.schedule == "interleaved":
            self._schedule: Any = ScheduleInterleaved1F1B(stages, plan.micros, **more)
        else:
            kind = Schedule1F1B if plan.schedule == "1f1b" else ScheduleGPipe
            self._schedule = kind(stages[0], plan.micros, **more)

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's, by the names of the whole model. With a tied head the first and the last
        stage each have the matrix; `gradients` keeps both alike."""
        named = {}
        for part in self.parts.values():
            for name, parameter in part.named_parameters():
                prefix = "" if name.startswith("lm_head") else "model."
                named[prefix + name] = parameter
        return named

    def gradients(self, batch: Tensor) -> float:
        """Forward and backward of this rank's stages over a batch (samples, tokens + 1), which is
        cut into micro-batches. Returns the scaled loss, on every rank."""
        losses: list[Tensor] = []
        given = (batch[:, :-1],) if self.first else ()
        more = {"target": batch[:, 1:], "losses": losses} if self.last else {}
        self._schedule.step(*given, **more, return_outputs=False)
        nats = torch.tensor(float(sum(loss.detach() for loss in losses)), dtype=torch.float64)
        dist.all_reduce(nats, group=self._group)
        if self._tied:
            self._sum_tied()
        return float(nats)

    def _sum_tied(self) -> None:
        """The embedding's gradient as input and as output."""
        named = self.parameters()
        held = [p for n, p in named.items() if n in ("model.embed_tokens.weight", "lm_head.weight")]
        alike = {id(p): p for p in held}.values()
        size = self._group.size()
        if size == 1:
            return
        ends = [0, size - 1]
        if self._group.rank() not in ends:
            return
        [parameter] = alike
        assert parameter.grad is not None
        other = ends[1] if self._group.rank() == 0 else ends[0]
        theirs = torch.empty_like(parameter.grad)
        sent = dist.isend(parameter.grad, group=self._group, group_dst=other)
        dist.recv(theirs, group=self._group, group_src=other)
        if sent is not None:
            sent.wait()
        first, second = (parameter.grad, theirs) if self.first else (theirs, parameter.grad)
        parameter.grad = first + second
