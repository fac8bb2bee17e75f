"""Tables of a job (`train.job`) about the model's shape and how a replica of it is spread over
workers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.reading import Strict


class ModelTable(Strict):
    """The model: one that exists, or the shape of a fresh one."""

    start_from: str = Field("", description="Model setting to go on from; empty: a fresh one.")
    layers: int = Field(3, ge=1, le=1024, description="Decoder layers.")
    hidden: int = Field(256, ge=8, le=65_536, description="Width of the residual stream.")
    heads: int = Field(4, ge=1, le=1024, description="Query heads; hidden is a multiple.")
    kv_heads: int = Field(4, ge=1, le=1024, description="Key and value heads; heads is a multiple.")
    feed_forward: int = Field(704, ge=8, le=1 << 20, description="Inner width of the SwiGLU.")
    rope_theta: float = Field(10_000.0, gt=1, description="Base of the rotary positions.")
    tied_head: bool = Field(True, description="The embedding is the output matrix, too.")

    experts: int = Field(
        0, ge=0, le=1024, description="Feed-forwards behind a router (MoE); 0: one, without."
    )
    experts_per_token: int = Field(2, ge=1, le=1024, description="That a token sees (experts).")
    balance: float = Field(
        0.01, ge=0, le=10, description="Of the loss by which experts are seen alike (experts)."
    )

    @model_validator(mode="after")
    def _mixture(self) -> Self:
        fields = type(self).model_fields
        for name in ("experts_per_token", "balance"):
            value = getattr(self, name)
            if not self.experts and value != fields[name].default:
                raise ValueError(
                    f"{name} = {value} is read where experts is 2 or more, but it is 0"
                )
        if self.experts == 1:
            raise ValueError("experts = 1: 0, or 2 and more, is accepted")
        if self.experts and self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token}: at most experts = {self.experts} "
                "is accepted"
            )
        if self.experts and self.start_from:
            raise ValueError(
                f"experts = {self.experts} with start_from: models with experts are trained from "
                "the beginning only; 0 is accepted"
            )
        return self

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden must be a multiple of 2 x heads = {2 * self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}")
        return self


class MeshTable(Strict):
    """A replica of the model over several workers (train/parallel/mesh*.py). `workers.count` is
    tensor x sequence x replicas; replicas have samples of their own (data parallelism)."""

    tensor: int = Field(
        1, ge=1, le=1024, description="Workers that share each matrix (Megatron-LM); 1: whole."
    )
    sequence_parallel: bool = Field(
        False, description="Tensor workers share the tokens between matrices, too (Megatron's SP)."
    )
    sequence: int = Field(
        1, ge=1, le=1024, description="Workers that share the tokens of each sequence; 1: whole."
    )
    sequence_kind: Literal["ring", "ulysses"] = Field(
        "ring", description="How these attend: keys go round, or heads are exchanged (sequence)."
    )
    full_shard: bool = Field(
        False, description="Replicas share weights, gradients and moments (FSDP)."
    )

    expert: int = Field(
        1, ge=1, le=1024, description="Replicas that share a layer's experts; 1: each has all."
    )
    expert_travel: Literal["tokens", "weights", "auto"] = Field(
        "tokens",
        description="What goes to the other's place; auto: what is faster, by trying (Tutel).",
    )

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for: a worker is a replica, and holds all of its state."""
        sizes = (self.tensor, self.sequence, self.expert)
        return sizes == (1, 1, 1) and not self.full_shard

    @property
    def replica_workers(self) -> int:
        """Workers of one replica."""
        return self.tensor * self.sequence
