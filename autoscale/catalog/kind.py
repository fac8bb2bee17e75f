"""A kind of GPU (or of CPU machine) as its data sheet has it. Frozen; read from one TOML each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuKind:
    """One accelerator. sm: its CUDA capability as 80, None for no CUDA device. bf16_tflops: dense
    products of its 16-bit format (float16 where it has no bfloat16). int8_tops and fp8_tflops are
    None where the hardware has no such products. source: where the figures are from."""

    name: str
    memory_bytes: int
    bf16_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float  # to the other accelerators of its machine, one way
    sm: int | None = None
    int8_tops: float | None = None
    fp8_tflops: float | None = None
    power_w: float | None = None
    source: str = ""
