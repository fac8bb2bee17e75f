"""The decoder on a device: the same model as decoder.py, over quantised weights and paged caches.

Ten launches a layer on a GPU, of the kernels in kernels/triton; on a CPU the same operations are
their torch references, which is how it is tested without a GPU. Sums are float32, the residual
stream has the dtype that it computes in, as in transformers. Fulfils what the engine asks of a
decoder (`states`, `logits`, `config`, `dtype`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.reference.kv_cache import read_cache
from kernels.reference.rope import inverse_frequencies
from models.batch import TokenBatch
from models.config import ModelConfig
from models.device.matrix import Matrix, multiply, multiply_fused, rows
from models.device.ops import Ops, ops_for
from models.device.step import Cache, CacheLayer, Chunks, Sizes, Step, step_of


class LayerWeights(NamedTuple):
    """qkv and gate_up: one matrix, or the parts that are of unlike kinds. Vectors and biases have
    the dtype that is computed in."""

    qkv: Sequence[Matrix]
    qkv_bias: torch.Tensor | None
    out: Matrix
    out_bias: torch.Tensor | None
    gate_up: Sequence[Matrix]
    down: Matrix
    mixer_norm: torch.Tensor
    feedforward_norm: torch.Tensor


class DeviceDecoder:
    """A decoder of `config`'s shape on the device of its weights. Holds no state between steps."""

    def __init__(
        self,
        config: ModelConfig,
        embed: Matrix,
        layers: Sequence[LayerWeights],
        norm: torch.Tensor,
        head: Matrix,
        ops: Ops | None = None,
    ) -> None:
        """norm: of the dtype that is computed in. ops: other than the fastest for the device."""
        self.config = config
        self.embed = embed
        self.layers = list(layers)
        self.norm = norm
        self.head = head
        self.device = norm.device
        self.ops = ops_for(norm.device) if ops is None else ops
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        self.frequencies = frequencies.inverse.to(norm.device)
        self.rope_scale = frequencies.scale
        self.sizes = Sizes(config.kv_heads, _units(norm.device))
        self.turn = _hadamard(config.head_dim).to(norm)

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in. A cache may be in any format of kernels.kv_planes."""
        return self.norm.dtype

    def forward(self, batch: TokenBatch, cache: Cache) -> torch.Tensor:
        """Logits [R, vocab] float32 of batch.logit_rows; see Decoder.forward."""
        return self.logits(self.states(batch, cache))

    __call__ = forward

    def states(self, batch: TokenBatch, cache: Cache) -> torch.Tensor:
        """[R, hidden]: what the head reads at batch.logit_rows; writes keys and values."""
        step = step_of(batch, cache.page_tokens, self.sizes, self.device)
        return self.rows(step, cache).index_select(0, batch.logit_rows.to(self.device))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32 of states [R, hidden]."""
        if not len(states):
            return torch.empty(0, self.config.vocab, device=self.device)
        return multiply(self.ops, states, self.head).float()

    def rows(self, step: Step, cache: Cache) -> torch.Tensor:
        """[N, hidden]: the final states of every row of a step; writes keys and values. Reads no
        value on the host, so that it can be captured."""
        eps, ops = self.config.rms_eps, self.ops
        angles = step.positions[:, None].float() * self.frequencies
        rotation = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        residual = rows(ops, step.ids, self.embed, self.dtype)
        normed = ops.rms_norm(residual, self.layers[0].mixer_norm, eps)
        following = [*(layer.mixer_norm for layer in self.layers[1:]), self.norm]
        for layer, norm, kept in zip(self.layers, following, cache.layers(), strict=True):
            mixed = self._mix(normed, layer, step, rotation, kept)
            normed, residual = ops.rms_norm_residual(mixed, residual, layer.feedforward_norm, eps)
            inner = ops.gated(multiply_fused(ops, normed, layer.gate_up), "silu")
            fed = multiply(ops, inner, layer.down)
            normed, residual = ops.rms_norm_residual(fed, residual, norm, eps)
        return normed

    def _mix(
        self,
        x: torch.Tensor,
        layer: LayerWeights,
        step: Step,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: CacheLayer,
    ) -> torch.Tensor:
        """Attention of one layer: x [N, hidden] -> the same shape."""
        config, ops = self.config, self.ops
        fused = multiply_fused(ops, x, layer.qkv, layer.qkv_bias)
        heads = [config.heads, config.kv_heads, config.kv_heads]
        q, k, v = torch.split(fused.view(len(x), sum(heads), config.head_dim), heads, dim=1)
        q, k = ops.rope(q, k, *rotation)
        turned = cache[0].dtype == torch.uint8
        if turned:
            q, k, v = q @ self.turn, k @ self.turn, v @ self.turn
        ops.kv_write(k, v, step.slots, *cache)
        attended = self._attend(q, step, cache)
        if turned:
            attended = attended @ self.turn
        return multiply(ops, attended.flatten(1), layer.out, layer.out_bias)

    def _attend(self, q: torch.Tensor, step: Step, cache: CacheLayer) -> torch.Tensor:
        """[N, H, D]: a row that is not of a sort has zeros there."""
        if step.paged is None:
            assert step.chunks is not None
            return self._read_chunks(q, step.chunks, cache)
        places = (step.paged.tables, step.paged.contexts)
        read = self.ops.paged_attention(q, *cache, *places, 0, step.paged.splits)
        return read if step.chunks is None else read + self._read_chunks(q, step.chunks, cache)

    def _read_chunks(self, q: torch.Tensor, chunks: Chunks, cache: CacheLayer) -> torch.Tensor:
        """Over what is stored, this step's keys too: how a prompt is cut then changes nothing."""
        slots = chunks.key_slots
        keys, values = (
            read_cache(_at(numbers, slots), None if scales is None else _at(scales, slots), q.dtype)
            for numbers, scales in ((cache[0], cache[2]), (cache[1], cache[3]))
        )
        places = {"starts": chunks.starts, "key_starts": chunks.key_starts}
        return self.ops.prefill_attention(q, keys, values, **places)


def _at(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """pages [pages, page_tokens, ...] -> [C, ...]: what slots [C] hold."""
    return pages.flatten(0, 1).index_select(0, slots)


def _units(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _hadamard(size: int) -> torch.Tensor:
    """[size, size] float32: Hadamard's matrix over sqrt(n) in blocks of n, the largest power of two
    in size; its own inverse. It levels a head's values, of which a few are large, so that 4 bits
    hold them better (QuaRot, Ashkboos et al., 2024)."""
    block = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.kron(torch.eye(size // block), matrix / math.sqrt(block))
