"""What fits into a replica's accelerators: tokens of keys and values beside the weights and a
step's activations. Used by profiles; the feasibility checker counts for itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from autoscale.catalog.kind import GpuKind
from autoscale.catalog.model import BITS, ModelSize
from autoscale.placement.plan import ReplicaShape

USABLE = 0.9  # of the memory; the rest is the driver's, the allocator's and fragments
STEP_TOKENS = 2048  # of the largest step, whose activations are kept free
STEP_SEQUENCES = 256


@dataclass(frozen=True)
class MemoryRoom:
    """Room in replicas of one model, by kind."""

    kinds: Mapping[str, GpuKind]
    model: ModelSize

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """Tokens whose keys and values fit; 0 where the weights do not."""
        if shape.kind not in self.kinds or shape.pipeline > self.model.layers:
            return 0
        first, last = 0, shape.pipeline - 1
        return max(0, min(self._stage_tokens(shape, stage) for stage in {first, last}))

    def _stage_tokens(self, shape: ReplicaShape, stage: int) -> int:
        """Layers are dealt out evenly, the early stages taking what is left over; embedding and
        head lie on the first and the last stage."""
        model, tensor = self.model, shape.tensor
        layers = -(-(model.layers - stage) // shape.pipeline)
        tables = _tables(model, shape.pipeline, stage)
        table_bytes = tables * model.embedding_parameters * max(shape.weight_bits, 16) / BITS
        weights = (layers * model.layer_weight_bytes(shape.weight_bits) + table_bytes) / tensor
        activations = model.activation_bytes(STEP_TOKENS, STEP_SEQUENCES) / tensor
        free = USABLE * self.kinds[shape.kind].memory_bytes - weights - activations
        heads = max(1.0, model.kv_heads / tensor)  # of each accelerator
        per_token = layers * model.kv_layer_bytes_per_token * heads / model.kv_heads
        return int(free // per_token) if free > 0 else 0


def _tables(model: ModelSize, stages: int, stage: int) -> int:
    """How many tables of vocab x hidden a stage holds."""
    if stages == 1:
        return 1 if model.tied_head else 2
    return int(stage == 0) + int(stage == stages - 1)
