"""A job's Llama as layers of a pipeline: the embedding, the decoder's layers, and norm with output.

Parameters have the names that they have in the whole model, so checkpoints of a pipeline and of
whole workers are the same.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.combine import ENDS
from train.job import Job
from train.model import Llama
from train.parallel.pipeline_layers import LayeredModel
from train.precision import COMPUTE
from train.resilience.templates import LayerCosts
from train.weights import Start, fill


class Output(nn.Module):
    """The last layer: the trunk's norm and the output matrix."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"norm": model.model.norm})
        self.lm_head = model.lm_head

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, tokens, vocab)."""
        logits: Tensor = self.lm_head(self.model["norm"](x))
        return logits


class JobLayers:
    """The layers of a job's model. Without memory for weights until one is built."""

    def __init__(self, job: Job, start: Start) -> None:
        """ValueError when the model's layers share weights."""
        if start.config.tied_head:
            raise ValueError(
                f"pipeline.stages = {job.pipeline.stages} needs layers that share no weights, but "
                f"in {job.model.start_from or 'the model'} the embedding is the output matrix, "
                "too: pipeline.stages = 0 is accepted"
            )
        self.job, self.start = job, start
        self.count = start.config.layers + ENDS
        with torch.device("meta"):
            self._skeleton = Llama(start.config)

    def prefix(self, layer: int) -> str:
        """What the names of a layer's parameters begin with in the whole model."""
        if layer == 0:
            return "model.embed_tokens."
        return "" if layer == self.count - 1 else f"model.layers.{layer - 1}."

    def empty(self, layer: int) -> nn.Module:
        """A layer without memory for its weights."""
        trunk = self._skeleton.model
        if layer == 0:
            return copy.deepcopy(trunk.embed_tokens)
        if layer == self.count - 1:
            return copy.deepcopy(Output(self._skeleton))
        made = copy.deepcopy(trunk.layers[layer - 1])
        made.register_forward_pre_hook(self._with_angles)
        return made

    def _with_angles(self, _layer: nn.Module, given: tuple[Tensor]) -> tuple[Tensor, ...]:
        [x] = given
        return (x, *self._skeleton.angles(x.shape[1], x.dtype))

    def build(self, layer: int) -> nn.Module:
        """A layer with the weights that the job begins with."""
        made = self.empty(layer).to_empty(device="cpu")
        made.to(COMPUTE[self.job.precision.compute])
        prefix = self.prefix(layer)
        fill(self.job, self.start, {f"{prefix}{n}": p for n, p in made.named_parameters()})
        return made

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of a layer's parameters, by their names in the whole model."""
        prefix = self.prefix(layer)
        return {f"{prefix}{n}": tuple(p.shape) for n, p in self.empty(layer).named_parameters()}

    def layered(self) -> LayeredModel:
        """As a pipeline takes them."""
        length, hidden = self.job.data.sequence_tokens, self.start.config.hidden
        return LayeredModel(
            count=self.count,
            build=self.build,
            prefix=self.prefix,
            boundary=lambda samples: (samples, length, hidden),
            loss=summed_loss,
            dtype=COMPUTE[self.job.precision.compute],
        )

    def costs(self) -> LayerCosts:
        """What layers cost by count, the same on every worker: multiplications of a token forward
        and backward for seconds, weights for bytes. Only their proportions count."""
        config, length = self.start.config, self.job.data.sequence_tokens
        weights = [sum(map(math.prod, self.shapes(n).values())) for n in range(self.count)]
        attention = config.heads * config.head_dim * length
        inner = [6.0 * (weight + attention) for weight in weights[1:-1]]
        seconds = (float(config.hidden), *inner, 6.0 * weights[-1])
        return LayerCosts(seconds, tuple(map(float, weights)), (0.0,) * self.count)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats; logits (batch, tokens, vocab), targets (batch, tokens)."""
    wide = logits.float() if logits.dtype != torch.float64 else logits
    return functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum")
