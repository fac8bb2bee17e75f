"""Throughput from data-sheet figures alone, for what nobody has measured: a step takes as long as
its arithmetic or its memory traffic, whichever is longer, and the messages between accelerators.

Weights are read once a step, keys and values once for each sequence; a prompt is bound by
arithmetic, decoding by memory. It calls itself a roofline wherever it is printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from autoscale.catalog.kind import GpuKind
from autoscale.catalog.memory import MemoryRoom
from autoscale.catalog.model import BITS, ModelSize
from autoscale.catalog.profile import Phase
from autoscale.catalog.rates import shape_rate
from autoscale.placement.demand import Bucket, Slo
from autoscale.placement.plan import ReplicaShape

MESSAGE_S = 1e-5  # of one collective, however small
OF_COMPUTE, OF_MEMORY = 0.5, 0.7


@dataclass(frozen=True)
class Roofline:
    """A profile of every kind in the catalogue. of_compute, of_memory: shares of the data sheet's
    figures that kernels are taken to reach."""

    kinds: Mapping[str, GpuKind]
    model: ModelSize
    of_compute: float = OF_COMPUTE
    of_memory: float = OF_MEMORY

    @property
    def source(self) -> str:
        return (
            f"roofline: data sheets at {self.of_compute:.0%} of arithmetic and "
            f"{self.of_memory:.0%} of memory bandwidth, nothing measured"
        )

    def kv_tokens(self, shape: ReplicaShape) -> int:
        return MemoryRoom(self.kinds, self.model).kv_tokens(shape)

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        return shape_rate(self, shape, bucket, slo)

    def step_s(
        self,
        shape: ReplicaShape,
        prefill_tokens: float,
        decode_sequences: float,
        context_tokens: float,
    ) -> float:
        """As `StepTimes`. Pipeline stages work at the same time on equal parts of the step."""
        stages, model = shape.pipeline, self.model
        layers = model.layers / stages
        prompt, sequences = prefill_tokens / stages, decode_sequences / stages
        stage_s = layers * self._layer_s(shape, prompt, sequences, context_tokens, prefill_tokens)
        head = 2 * model.embedding_parameters * (sequences + (prompt > 0))
        table_bytes = model.embedding_parameters * 16 / BITS
        return stages * stage_s + self._at_least(shape, head, table_bytes)

    def layer_s(self, kind: str, phase: Phase, tokens: float) -> float:
        """As `LayerTimes`, on one accelerator; decoding at contexts of 1,024 tokens."""
        shape = ReplicaShape(kind)
        if phase == "prefill":
            return self._layer_s(shape, tokens, 0, 0, tokens)
        return self._layer_s(shape, 0, tokens, 1024, 0)

    def _layer_s(
        self,
        shape: ReplicaShape,
        prompt: float,
        sequences: float,
        context: float,
        prompt_context: float,
    ) -> float:
        model, rows = self.model, prompt + sequences
        if rows == 0:
            return 0.0
        pairs = prompt * prompt_context / 2 + sequences * context
        products = model.layer_parameters * rows + 2 * model.heads * model.head_dim * pairs
        keys = model.kv_layer_bytes_per_token * (sequences * context + prompt)
        traffic = model.layer_weight_bytes(shape.weight_bits) + keys
        return self._at_least(shape, 2 * products, traffic) + self._messages_s(shape, rows)

    def _at_least(self, shape: ReplicaShape, operations: float, traffic_bytes: float) -> float:
        kind = self.kinds[shape.kind]
        compute_s = operations / (kind.bf16_tflops * 1e12 * self.of_compute)
        memory_s = traffic_bytes / (kind.memory_gb_per_s * 1e9 * self.of_memory)
        return max(compute_s, memory_s) / shape.tensor

    def _messages_s(self, shape: ReplicaShape, rows: float) -> float:
        """Two all-reduces of the residual stream, as a ring."""
        if shape.tensor == 1:
            return 0.0
        link = self.kinds[shape.kind].link_gb_per_s * 1e9
        sent = 2 * (shape.tensor - 1) / shape.tensor * rows * self.model.hidden * 2
        return 2 * (sent / link + MESSAGE_S)
