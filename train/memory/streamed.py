"""A Llama of which one layer at a time is in memory; weights come from files, gradients go there.

Layers are the outer loop and micro-batches the inner one, so that a step reads each layer twice
however many micro-batches it has: once forward, once to compute it again and go backward. Between
the two, the inputs of layers stay in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from train.memory.segments import EMBEDDING, Layout, Matrix, Segment
from train.memory.tier import Tier
from train.memory.tiled import TiledLinear, look_up, look_up_backward, product
from train.model import Llama
from train.world import World

Values = Mapping[str, nn.Parameter]


class TierTiles:
    """A matrix' tiles in a tier. touched: segments that have a gradient of this step."""

    def __init__(self, matrix: Matrix, tier: Tier, touched: set[int]) -> None:
        self.rows, self.columns = matrix.shape
        self.height, self.segments = matrix.rows, matrix.tiles
        self._tier, self._touched = tier, touched
        self._held: Tensor | None = None

    def tile(self, number: int) -> Tensor:
        """See `Tiles`; the next one is read meanwhile."""
        self.drop()
        segment = self.segments[number]
        self._held = self._tier.take("param", segment)
        if number + 1 < len(self.segments):
            self._tier.hint("param", self.segments[number + 1])
        return self._held[: segment.elements].view(-1, self.columns)

    def drop(self) -> None:
        """Gives the last tile's memory back."""
        if self._held is not None:
            self._tier.release(self._held)
            self._held = None

    def add_gradient(self, number: int, gradient: Tensor) -> None:
        """See `Tiles`; the sum is in the file."""
        segment = self.segments[number]
        if segment.number in self._touched:
            place = self._tier.take("gradient", segment)
        else:
            place = self._tier.buffer("gradient", segment).zero_()
            self._touched.add(segment.number)
        place[: segment.elements].view_as(gradient).add_(gradient)
        self._tier.put("gradient", segment, place)


@dataclass
class Totals:
    """Of a gradient: the sum of its squares so far, and the summed loss."""

    squares: float
    loss: Tensor


class StreamedLlama:
    """Computes losses and gradients of a model that lies in a tier (kinds "param", "gradient")."""

    def __init__(self, layout: Layout, tier: Tier) -> None:
        self.layout, self.tier = layout, tier
        self.dtype = tier.dtypes["param"]
        self.touched: set[int] = set()
        with torch.device("meta"):
            self._shell = Llama(layout.config)
        self.matrices = {
            name: TierTiles(matrix, tier, self.touched) for name, matrix in layout.matrices.items()
        }
        for name, tiles in self.matrices.items():
            path = name.removesuffix(".weight")
            if ".layers." in name:
                linear = self._shell.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                parent, _, leaf = path.rpartition(".")
                setattr(self._shell.get_submodule(parent), leaf, TiledLinear(tiles, linear.bias))
        self._head = self.matrices[layout.head.name]
        self._embedding = self.matrices[EMBEDDING]

    @torch.no_grad()
    def loss(self, tokens: Tensor) -> Tensor:
        """As `Llama.loss`, without a gradient."""
        (x,) = self._forward([tokens])[-1]
        with self._weights(self.layout.norm) as norm:
            loss = self._top(x, tokens, next(iter(norm.values())))
        self._drop()
        return loss

    def gradient(self, micros: Sequence[Tensor], divisor: int, world: World) -> Totals:
        """Leaves the gradient of the micro-batches' losses / divisor, summed over the workers, in
        the tier. micros: of (batch, tokens + 1) each; there may be none. On WorldChanged, what is
        in the tier as gradient is undefined."""
        self.touched.clear()
        totals = Totals(0.0, torch.zeros((), dtype=self.tier.dtypes["gradient"]))
        with torch.no_grad():
            inputs = self._forward(micros)
        backs = self._backward_top(inputs.pop(), micros, divisor, world, totals)
        for number in reversed(range(len(self.layout.layers))):
            backs = self._backward_layer(number, inputs.pop(), backs, world, totals)
        if micros:
            look_up_backward(_ids(micros), torch.cat(backs), self._embedding)
        self._sum_tiles(world, totals)
        return totals

    def _forward(self, micros: Sequence[Tensor]) -> list[list[Tensor]]:
        """Inputs of each layer and, last, of the norm, for each micro-batch."""
        layers = self.layout.layers
        self.tier.hint("param", layers[0])
        first = look_up(_ids(micros), self._embedding) if micros else torch.empty(0)
        inputs = [list(torch.split(first, [len(tokens) for tokens in micros]))]
        self._drop()
        for number, segment in enumerate(layers):
            following = layers[number + 1] if number + 1 < len(layers) else self.layout.norm
            with self._weights(segment, following) as values:
                inputs.append([self._layer(number, values, x) for x in inputs[-1]])
        return inputs

    def _layer(self, number: int, values: Values, x: Tensor) -> Tensor:
        cos, sin = self._shell.angles(x.shape[1], self.dtype)
        prefix = f"model.layers.{number}."
        named: dict[str, Tensor] = {
            name.removeprefix(prefix): value for name, value in values.items()
        }
        layer = self._shell.model.layers[number]
        assert isinstance(layer, nn.Module)
        out: Tensor = functional_call(layer, named, (x, cos, sin))
        return out

    def _top(self, x: Tensor, tokens: Tensor, norm: Tensor) -> Tensor:
        """The summed cross-entropy, as `Llama.loss` has it."""
        normal = functional.rms_norm(x, (x.shape[-1],), norm, self.layout.config.rms_eps)
        logits = product(normal, self._head)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(
            wide.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )

    def _backward_top(
        self,
        inputs: list[Tensor],
        micros: Sequence[Tensor],
        divisor: int,
        world: World,
        totals: Totals,
    ) -> list[Tensor]:
        backs, segment = [], self.layout.norm
        with self._weights(segment, self.layout.layers[-1]) as values:
            gradient = self._collect(segment, values)
            for x, tokens in zip(inputs, micros, strict=True):
                x = x.requires_grad_()
                loss = self._top(x, tokens, next(iter(values.values()))) / divisor
                loss.backward()  # type: ignore[no-untyped-call]
                totals.loss += loss.detach()
                assert x.grad is not None
                backs.append(x.grad)
        self._drop()
        self._keep(segment, gradient, world, totals)
        return backs

    def _backward_layer(
        self, number: int, inputs: list[Tensor], backs: list[Tensor], world: World, totals: Totals
    ) -> list[Tensor]:
        segment, found = self.layout.layers[number], []
        below = self.layout.layers[number - 1] if number else None
        with self._weights(segment, below) as values:
            gradient = self._collect(segment, values)
            for x, back in zip(inputs, backs, strict=True):
                x = x.requires_grad_()
                self._layer(number, values, x).backward(back)  # type: ignore[no-untyped-call]
                assert x.grad is not None
                found.append(x.grad)
        self._drop()
        self._keep(segment, gradient, world, totals)
        return found

    @contextmanager
    def _weights(self, segment: Segment, following: Segment | None = None) -> Iterator[Values]:
        """A segment's parameters by name, while the following one is read."""
        memory = self.tier.take("param", segment)
        if following is not None:
            self.tier.hint("param", following)
        yield {
            slot.name: nn.Parameter(memory[slot.start : slot.stop].view(slot.shape))
            for slot in segment.slots
        }
        self.tier.release(memory)

    def _collect(self, segment: Segment, values: Values) -> Tensor:
        """Memory that the parameters' gradients are added up in, in the masters' dtype."""
        gradient = self.tier.buffer("gradient", segment).zero_()
        for slot in segment.slots:
            place = gradient[slot.start : slot.stop].view(slot.shape)
            parameter = values[slot.name]
            if place.dtype == parameter.dtype:
                parameter.grad = place
            else:
                _move(parameter, place)
        return gradient

    def _keep(self, segment: Segment, gradient: Tensor, world: World, totals: Totals) -> None:
        world.all_reduce(gradient)
        totals.squares += squares(gradient)
        self.tier.put("gradient", segment, gradient)

    def _sum_tiles(self, world: World, totals: Totals) -> None:
        tiles = [tile for matrix in self.layout.matrices.values() for tile in matrix.tiles]
        for number, segment in enumerate(tiles):
            if segment.number in self.touched:
                gradient = self.tier.take("gradient", segment)
            else:  # a worker without samples
                gradient = self.tier.buffer("gradient", segment).zero_()
            if number + 1 < len(tiles) and tiles[number + 1].number in self.touched:
                self.tier.hint("gradient", tiles[number + 1])
            if world.size > 1:
                self._keep(segment, gradient, world, totals)
            else:
                totals.squares += squares(gradient)
                self.tier.release(gradient)

    def _drop(self) -> None:
        for tiles in self.matrices.values():
            tiles.drop()


def squares(gradient: Tensor) -> float:
    """Their sum, in float64."""
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2


def _ids(micros: Sequence[Tensor]) -> Tensor:
    return torch.cat([tokens[:, :-1] for tokens in micros])


def _move(parameter: nn.Parameter, place: Tensor) -> None:
    """Has autograd add the parameter's gradient to a wider place."""

    def move(given: Tensor) -> None:
        assert given.grad is not None
        place.add_(given.grad)
        given.grad = None

    parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
