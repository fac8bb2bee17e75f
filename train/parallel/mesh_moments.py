"""What a worker of a mesh has for moments beside its state and what it keeps for a backward pass,
and so the most that its tensors take, by count of what the code of each moment has at once.

Of a mixture, the moment behind a feed-forward is counted as that of one as wide as an expert, which
is less than its rows take on their way; the record was compared where logits take most.

Pure arithmetic, as `mesh_cost`. tests/train/parallel/test_mesh_cost.py holds it against the record
of torch's allocator.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from models.config import ModelConfig
from train.parallel.mesh_cost import (
    WIDTHS_BYTES,
    Batch,
    MeshShape,
    activation_bytes,
    elements,
    layer_bytes,
    matrices,
    state_bytes,
)


@dataclass(frozen=True)
class WorkingBytes:
    """moments: bytes beside state and activations by when, in the order of a step; of what was kept
    that is taken off which is gone by then, so some are below 0."""

    moments: Mapping[str, int]

    @property
    def when(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: self.moments[moment])

    @property
    def total(self) -> int:
        """Its bytes."""
        return self.moments[self.when]


@dataclass(frozen=True)
class _Sizes:
    """Bytes as computed with, and the two widths. stream: of what lies between matrices, of all
    tokens; own: of this worker's share of it; head: of the output matrix; coming: of a whole layer
    where replicas share it; ends: so of the embedding, the output matrix and the last norm."""

    narrow: int
    wide: int
    stream: int
    own: int
    logits: int
    inner: int
    head: int
    down: int
    coming: int
    ends: int

    def wider(self, size: int) -> int:
        """The same numbers in the wide dtype."""
        return size // self.narrow * self.wide

    def cast(self, size: int) -> int:
        """A second copy, where the dtypes differ."""
        return size if self.narrow != self.wide else 0


def working_bytes(
    config: ModelConfig, shape: MeshShape, batch: Batch, compute: str
) -> WorkingBytes:
    """Of all moments that can be the largest. While a layer is computed backward, `full_shard` has
    the one before it put together."""
    sizes = _sizes(config, shape, batch, compute)
    narrow, wide = WIDTHS_BYTES[compute]
    moments = {
        # The greatest logit is taken off them, and that raised, beside the logits as made.
        "at the loss": 2 * sizes.wider(sizes.logits) + sizes.cast(sizes.logits),
        "behind the output matrix": _behind_head(sizes, shape),
    }
    # The logits' exponentials and the last norm's result are gone from here on. A tied matrix's
    # gradient waits for that of the lookups, a shared one for all of the pass.
    waiting = sizes.head if config.tied_head or shape.shared else 0
    gone = sizes.wider(sizes.logits) + sizes.own
    # The gradient as it came, the normed input, the product of both, the input's gradient.
    norm = 4 * sizes.wider(sizes.own) + 2 * sizes.cast(sizes.own)
    moments["behind the last norm"] = waiting - gone + norm + sizes.coming
    # The last norm's input is gone, too; a gradient of its size is there instead.
    gathered = sizes.stream if shape.sequence_parallel else 0
    # Of the opened gate and of what it is multiplied by, while that of the product is in the
    # product's place; of the last matrix, if no place waits for it; two layers.
    opened = 2 * sizes.inner + gathered + (sizes.down if shape.shared else 0)
    moments["behind the last feed-forward"] = waiting - gone + opened + 2 * sizes.coming
    if shape.shared:
        tokens = batch.micro_samples * batch.sequence_tokens // shape.sequence
        layer = layer_bytes(config, shape, compute, tokens)
        # As gathered, as its matrices, and the layer before it as gathered.
        moments["as a layer is put together"] = waiting - gone + 3 * sizes.coming
        # All of it as sent and as received, the layer before it; a share of it as the sum, as it is
        # added up and as what is added to it.
        share = sizes.coming // shape.replicas
        summed = share + sizes.wider(share) + sizes.wider(sizes.cast(share))
        moments["as a layer's gradient is summed"] = (
            waiting - gone - layer + 3 * sizes.coming + summed
        )
    return WorkingBytes({name: size + sizes.ends for name, size in moments.items()})


def _behind_head(sizes: _Sizes, shape: MeshShape) -> int:
    """The logits' gradient is in the place of their exponentials; then that of what came in. Shared
    tokens are gathered before; cut by rank, received, and added up after it."""
    found = sizes.logits - sizes.wider(sizes.logits) + sizes.coming + sizes.stream
    if shape.sequence_parallel:
        return found + 3 * sizes.stream + sizes.wider(sizes.own) + sizes.cast(sizes.own)
    return found + sizes.head


def _sizes(config: ModelConfig, shape: MeshShape, batch: Batch, compute: str) -> _Sizes:
    narrow, wide = WIDTHS_BYTES[compute]
    tokens = batch.micro_samples * batch.sequence_tokens // shape.sequence
    stream, width = narrow * tokens * config.hidden, config.ff // shape.tensor
    held, shared = matrices(config, shape.tensor, shape.mixture), int(shape.shared)
    rows = held.ends[0][0]
    return _Sizes(
        narrow,
        wide,
        stream,
        stream // (shape.tensor if shape.sequence_parallel else 1),
        narrow * tokens * rows,
        narrow * tokens * width,
        narrow * rows * config.hidden,
        narrow * config.hidden * width,
        shared * narrow * elements(held.layer),
        shared * narrow * elements(held.ends),
    )


def peak_bytes(
    config: ModelConfig, shape: MeshShape, batch: Batch, compute: str, moments: int = 2
) -> int:
    """Of a worker's tensors at their most. With `full_shard` the gradient of the only pass is made
    as activations go; else its place is there, or that of the passes before."""
    state = state_bytes(config, shape, compute, moments)
    kept = activation_bytes(config, shape, batch, compute)
    working = working_bytes(config, shape, batch, compute).total
    late = state.gradient if shape.shared and batch.passes == 1 else 0
    return max(state.total - late + kept + working, state.total)
