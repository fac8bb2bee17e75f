"""The Llama of `train.model`, spread over a mesh: matrices over tensor ranks, a sequence over
sequence ranks, and, with `sequence_parallel`, what lies between matrices over tensor ranks, too.

Parameters have the names of the whole model's, and are this rank's parts of them.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.reference.rope import inverse_frequencies
from models.config import ModelConfig
from train.fused import rotate
from train.model import Norm
from train.parallel.experts import Experts, Placement
from train.parallel.mesh import Axis, Mesh
from train.parallel.order import Order
from train.parallel.ring import Ring, ring_attention
from train.parallel.tensor_exchange import column, row
from train.parallel.ulysses import ulysses_attention
from train.parallel.vocabulary import cross_entropy, embed, rows_of

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of (batch, heads, tokens, head_dim)."""
COLUMN = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
COLUMN_BIAS = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
ROW = ("o_proj.weight", "down_proj.weight")
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
EXPERTS = ("experts.gate", "experts.up", "experts.down")
SPLIT = COLUMN + COLUMN_BIAS + ROW + VOCABULARY


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One rank's, of whole sequences."""
    gqa = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=gqa
    )


class MeshAttention(nn.Module):
    """Attention over this rank's heads."""

    def __init__(self, config: ModelConfig, axis: Axis, sequence: bool, attend: Attend) -> None:
        super().__init__()
        self._axis, self._sequence, self._attend = axis, sequence, attend
        self._width = config.head_dim
        query = config.heads // axis.size * config.head_dim
        key = config.kv_heads // axis.size * config.head_dim
        self._sizes = [query, key, key]
        self.q_proj = nn.Linear(config.hidden, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden, key, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden, key, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (batch, tokens, hidden), a tensor rank's tokens if they are shared."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weights = [part.weight for part in parts]
        joined = column(x, weights, self._axis, self._sequence)
        if self.q_proj.bias is not None:
            joined = joined + torch.cat([part.bias for part in parts])
        query, key, value = (
            part.view(*part.shape[:2], -1, self._width)
            for part in torch.split(joined, self._sizes, -1)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = self._attend(*(part.transpose(1, 2) for part in (query, key, value)))
        flat = mixed.transpose(1, 2).flatten(2)
        return row(flat, self.o_proj.weight, self._axis, self._sequence)


class MeshFeedForward(nn.Module):
    """SwiGLU over this rank's inner columns."""

    def __init__(self, config: ModelConfig, axis: Axis, sequence: bool) -> None:
        super().__init__()
        self._axis, self._sequence = axis, sequence
        inner = config.ff // axis.size
        self.gate_proj = nn.Linear(config.hidden, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, hidden), a tensor rank's tokens if they are shared."""
        weights = (self.gate_proj.weight, self.up_proj.weight)
        gate, up = column(x, weights, self._axis, self._sequence).chunk(2, -1)
        return row(functional.silu(gate) * up, self.down_proj.weight, self._axis, self._sequence)


class ExpertTable(NamedTuple):
    """A mixture instead of each feed-forward: how many experts, each of the model's width, and how
    many of them a token sees. balance: what the loss that makes them seen alike counts."""

    experts: int
    top_k: int
    balance: float = 0.01


class MeshExperts(nn.Module):
    """A mixture of experts that data ranks share. balance: the loss of the newest pass; degree: of
    parallelism of the next one (`Experts`)."""

    def __init__(self, config: ModelConfig, axis: Axis, table: ExpertTable) -> None:
        super().__init__()
        self.experts = Experts(config.hidden, config.ff, table.experts, table.top_k, axis.group)
        self.balance = torch.zeros(())
        self.degree = self.experts.placement.slices

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, hidden)."""
        out, routing = self.experts(x.flatten(0, 1), self.degree)
        self.balance = routing.balance
        made: Tensor = out.view_as(x)
        return made


class MeshLayer(nn.Module):
    """Attention and feed-forward, each behind its norm."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        sequence: bool,
        attend: Attend,
        table: ExpertTable | None,
    ) -> None:
        super().__init__()
        axis = mesh.tensor
        self.input_layernorm = Norm(config.hidden, config.rms_eps)
        self.self_attn = MeshAttention(config, axis, sequence, attend)
        self.post_attention_layernorm = Norm(config.hidden, config.rms_eps)
        self.mlp: nn.Module = (
            MeshExperts(config, mesh.expert, table)
            if table is not None
            else MeshFeedForward(config, axis, sequence)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens, hidden) in, the same out."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Trunk(nn.Module):
    def __init__(self, config: ModelConfig, rows: slice, layers: list[MeshLayer]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows.stop - rows.start, config.hidden)
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(config.hidden, config.rms_eps)


class MeshLlama(nn.Module):
    """This rank's part of a causal language model.

    sequence_tokens: of the sequences it trains on. sequence_parallel: tokens between matrices are
    shared by tensor ranks. ring: how sequence ranks attend; if not, they exchange heads (Ulysses).
    experts: instead of feed-forwards, shared by the ranks of mesh.expert.
    ValueError for what cannot be shared out.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        sequence_tokens: int,
        *,
        sequence_parallel: bool = False,
        ring: bool = True,
        experts: ExpertTable | None = None,
    ) -> None:
        super().__init__()
        _check(config, mesh.tensor)
        self.config, self.mesh, self.sequence_parallel = config, mesh, sequence_parallel
        self._order = Order(sequence_tokens, mesh.sequence.size, ring and mesh.sequence.size > 1)
        if sequence_parallel and self._order.local_tokens % mesh.tensor.size:
            raise ValueError(
                f"mesh.tensor = {mesh.tensor.size} ranks cannot share {self._order.local_tokens} "
                "tokens evenly"
            )
        if experts is not None and (sequence_parallel or mesh.tensor.size > 1):
            raise ValueError("model.experts are not split by mesh.tensor; 1 would be accepted")
        self.experts = experts
        rows, attend = rows_of(config.vocab, mesh.tensor), self._attend(ring)
        layers = [
            MeshLayer(config, mesh, sequence_parallel, attend, experts)
            for _ in range(config.layers)
        ]
        self.model = _Trunk(config, rows, layers)
        self._first = rows.start
        self.lm_head = nn.Linear(config.hidden, rows.stop - rows.start, bias=False)
        self.tie()
        with torch.device("cpu"):  # also where the parameters have no memory yet
            self._frequencies = inverse_frequencies(config.rope, config.head_dim)

    def tie(self) -> None:
        """Makes the embedding the output matrix, too, if it is to be. Again after the parameters
        were replaced, as `to_empty` does."""
        if self.config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _attend(self, ring: bool) -> Attend:
        group = self.mesh.sequence.group
        if group is None:
            return causal
        if not ring:
            return lambda q, k, v: ulysses_attention(q, k, v, group)
        round_trip = Ring(group, self._order)
        return lambda q, k, v: ring_attention(q, k, v, round_trip)

    def loss(self, tokens: Tensor, balanced: bool = True) -> Tensor:
        """Summed cross-entropy in nats of this rank's share of tokens (batch, tokens + 1), which
        all ranks of a replica are given whole. The sum over sequence ranks is the loss; tensor
        ranks have the same. balanced: with what a mixture's imbalance adds, that of this rank's own
        tokens."""
        axis = self.mesh.tensor
        positions = self._order.positions(self.mesh.sequence.rank)
        mine, targets = tokens[:, :-1][:, positions], tokens[:, 1:][:, positions]
        weight = self.model.embed_tokens.weight
        x = embed(mine, weight, self._first, axis, self.sequence_parallel)
        cos, sin = self.angles(positions, x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        x = self.model.norm(x)
        logits = column(x, (self.lm_head.weight,), axis, self.sequence_parallel)
        nats = cross_entropy(logits.flatten(0, 1), targets.flatten(), self._first, axis)
        return nats + self._imbalance() * targets.numel() if balanced else nats

    def _imbalance(self) -> Tensor | float:
        if self.experts is None or not self.experts.balance:
            return 0.0
        losses = [mixture.balance for mixture in self.mixtures]
        return self.experts.balance * torch.stack(losses).mean()

    @property
    def mixtures(self) -> list[MeshExperts]:
        """One for each layer; none without experts."""
        return [module for module in self.modules() if isinstance(module, MeshExperts)]

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions (n,), each (n, head_dim / 2)."""
        inverse, scale = self._frequencies
        angles = torch.outer(positions.to(torch.float32), inverse)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    @property
    def expert_names(self) -> list[str]:
        """Names of parameters that only ranks of mesh.replicas have alike."""
        return [name for name, _ in self.named_parameters() if name.endswith(EXPERTS)]

    @property
    def whole_everywhere(self) -> list[str]:
        """Names of parameters that every tensor rank has whole: norms, experts."""
        return [name for name, _ in self.named_parameters() if not name.endswith(SPLIT)]

    def load_whole(self, values: Mapping[str, Tensor]) -> None:
        """This rank's parts of the whole model's parameters by name."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(self.part(name, values[name]))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's of a parameter, a view."""
        axis = self.mesh.tensor
        if name in self.expert_names:
            return self._expert_part(name, whole)
        if name.endswith(VOCABULARY):
            return whole[rows_of(len(whole), axis)]
        if name.endswith(COLUMN + COLUMN_BIAS):
            return whole.chunk(axis.size, 0)[axis.rank]
        if name.endswith(ROW):
            return whole.chunk(axis.size, 1)[axis.rank]
        return whole

    def _expert_part(self, name: str, whole: Tensor) -> Tensor:
        """Of (experts, ff, hidden), or (experts, hidden, ff) for `down`."""
        axis = self.mesh.expert
        at = Placement.of(len(whole), axis.size)
        first = axis.rank * at.local // at.slices
        held = whole[first : first + at.local]
        return held.chunk(at.slices, 2 if name.endswith("down") else 1)[axis.rank % at.slices]


def _check(config: ModelConfig, axis: Axis) -> None:
    rows = -(-config.vocab // axis.size)
    if rows * (axis.size - 1) >= config.vocab:
        raise ValueError(
            f"mesh.tensor = {axis.size} ranks cannot share a vocabulary of {config.vocab}: the "
            "last one would have none of it"
        )
    if config.out_bias:
        raise ValueError("a model with a bias behind its attention cannot be split by mesh.tensor")
    for name, count in (("kv_heads", config.kv_heads), ("feed_forward", config.ff)):
        if count % axis.size:
            raise ValueError(
                f"mesh.tensor = {axis.size} ranks cannot share model.{name} = {count} evenly"
            )
