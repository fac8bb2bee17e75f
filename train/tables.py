"""Tables of a job (`train.job`) about what is sent between workers and what is kept in memory."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.reading import Strict

WARMUP_STEPS = 100
"""Of every kind of compression but 1-bit Adam, if a job does not say."""


class CompressionTable(Strict):
    """How gradients are made smaller on their way between workers (train/communication)."""

    kind: Literal["none", "onebit", "powersgd", "dgc", "qsgd"] = Field(
        "none", description="1-bit Adam, PowerSGD, Deep Gradient Compression, QSGD, or as they are."
    )
    rank: int = Field(2, ge=1, le=4096, description="Of a matrix's gradient (powersgd).")
    ratio: float = Field(0.001, gt=0, le=1, description="Share of values that is sent (dgc).")
    bits: int = Field(8, ge=2, le=8, description="A value takes at most (qsgd).")
    warmup_steps: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Steps that send all (dgc: less and less); auto: 100, or until the variance "
        "of the gradient is stable (onebit).",
    )

    @property
    def given_steps(self) -> int | None:
        """Of warm-up; None where 1-bit Adam decides as it goes (train/communication/freeze.py)."""
        if isinstance(self.warmup_steps, int):
            return self.warmup_steps
        return None if self.kind == "onebit" else WARMUP_STEPS

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        for name, kind in (("rank", "powersgd"), ("ratio", "dgc"), ("bits", "qsgd")):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and self.kind != kind:
                raise ValueError(
                    f'{name} = {value} is read where kind = "{kind}", but kind = "{self.kind}"'
                )
        return self


class CommunicationTable(Strict):
    """When gradients are sent."""

    overlap: bool = Field(False, description="While the backward pass goes on, in buckets.")
    bucket_bytes: int = Field(4 << 20, ge=1024, description="Of a bucket's gradient (overlap).")


class MemoryTable(Strict):
    """What is done to train in less memory (train/memory)."""

    activations: Literal["keep", "recompute", "mesa", "gact"] = Field(
        "keep", description="Kept, computed again, in 8 bits (mesa) or in as many as pay (gact)."
    )
    bits: float = Field(8, ge=1, le=8, description="Mean bits of saved numbers (gact); mesa has 8.")
    recompute: Literal["all", "cheap"] = Field(
        "all", description="A whole layer, or all but products and attention (recompute)."
    )
    layers: int = Field(0, ge=0, description="Layers from the first on that do so; 0: all.")
    offload: Literal["none", "cpu", "disk"] = Field(
        "none", description="Where masters and moments are: cpu; disk: weights and gradient, too."
    )
    folder: str = Field(
        "", description="Of the files; empty: none for cpu (plain memory), the run's for disk."
    )
    late_from_step: int = Field(
        0,
        ge=0,
        description="Updates from this step on come one late, beside passes (cpu); 0: no.",
    )
    tile_bytes: int = Field(
        64 << 20, ge=4096, description="Larger matrices are read and computed in tiles (disk)."
    )

    @model_validator(mode="after")
    def _sense(self) -> Self:
        if self.activations == "mesa" and self.bits != 8:
            raise ValueError(f"bits = {self.bits}: mesa has 8; gact takes 1 to 8")
        if self.offload == "disk" and self.activations not in ("keep", "recompute"):
            raise ValueError(
                f'activations = "{self.activations}" does not go with offload = "disk", which '
                'computes layers again from their inputs: "keep" and "recompute" do'
            )
        if self.late_from_step and self.offload != "cpu":
            raise ValueError('late_from_step needs offload = "cpu"; 0 is accepted elsewhere')
        return self

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for."""
        return self.activations == "keep" and self.offload == "none"
