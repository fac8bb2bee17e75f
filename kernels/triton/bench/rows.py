"""Row-wise kernels against torch's own, experts and adapters against loops of products.

Called by `__main__`.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kernels.triton.bench.measure import Contender, Row, relative_error
from kernels.triton.gated import gated
from kernels.triton.lora_batched import sgmv
from kernels.triton.moe import grouped_linear
from kernels.triton.norm import rms_norm, rms_norm_residual
from kernels.triton.rope import rope

HIDDEN, INNER, HEADS, KV_HEADS, WIDTH = 4096, 14336, 32, 8, 128
TOKENS = (1, 64, 4096)
EXPERTS, ROUTED = 8, (16, 256, 4096)
RANK, ADAPTERS, BATCHES = 16, 8, (8, 64, 1024)
HALF = torch.bfloat16


def rowwise_rows(device: torch.device) -> Iterator[Row]:
    """Bytes are those read once and written once."""
    for tokens in TOKENS:
        made: dict[str, tuple[Callable[[int], list[Contender]], int]] = {
            "rms_norm": (lambda t: _norm(device, t), 4 * HIDDEN),
            "rms_norm_residual": (lambda t: _norm_residual(device, t), 8 * HIDDEN),
            "gated": (lambda t: _gated(device, t), 6 * INNER),
            "rope": (lambda t: _rope(device, t), 4 * (HEADS + KV_HEADS) * WIDTH + 4 * WIDTH),
        }
        for name, (make, each) in made.items():
            yield Row(
                "rowwise",
                f"{name} T={tokens}",
                lambda make=make, tokens=tokens: make(tokens),  # type: ignore[misc]
                each * tokens,
            )


def _against(
    ours: Callable[[], torch.Tensor], peer: Callable[[], torch.Tensor], name: str
) -> list[Contender]:
    return [
        Contender("ours", lambda _: ours(), True, check=lambda: relative_error(ours(), peer())),
        Contender(name, lambda _: peer(), False),
    ]


def _norm(device: torch.device, tokens: int) -> list[Contender]:
    x = torch.randn(tokens, HIDDEN, dtype=HALF, device=device)
    weight = torch.rand(HIDDEN, dtype=HALF, device=device)
    return _against(
        lambda: rms_norm(x, weight, 1e-5),
        lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-5),
        "torch",
    )


def _norm_residual(device: torch.device, tokens: int) -> list[Contender]:
    x, y = (torch.randn(tokens, HIDDEN, dtype=HALF, device=device) for _ in range(2))
    weight = torch.rand(HIDDEN, dtype=HALF, device=device)
    return _against(
        lambda: rms_norm_residual(x, y, weight, 1e-5)[0],
        lambda: F.rms_norm(x + y, (HIDDEN,), weight, 1e-5),
        "torch",
    )


def _gated(device: torch.device, tokens: int) -> list[Contender]:
    x = torch.randn(tokens, 2 * INNER, dtype=HALF, device=device)

    def peer() -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    return _against(lambda: gated(x, "silu"), peer, "torch")


def _rope(device: torch.device, tokens: int) -> list[Contender]:
    q = torch.randn(tokens, HEADS, WIDTH, dtype=HALF, device=device)
    k = torch.randn(tokens, KV_HEADS, WIDTH, dtype=HALF, device=device)
    angles = torch.randn(tokens, WIDTH // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    wide_cos, wide_sin = (torch.cat((each, each), -1)[:, None].to(HALF) for each in (cos, sin))

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * wide_cos + torch.cat((-second, first), dim=-1) * wide_sin

    return [
        Contender(
            "ours",
            lambda _: rope(q, k, cos, sin),
            True,
            check=lambda: relative_error(rope(q, k, cos, sin)[0], turned(q)),
        ),
        Contender("torch", lambda _: (turned(q), turned(k)), False),
    ]


def expert_rows(device: torch.device) -> Iterator[Row]:
    for routed in ROUTED:
        used = min(routed, EXPERTS)
        yield Row(
            "grouped_linear",
            f"{EXPERTS} experts, rows={routed}",
            lambda routed=routed: _experts(device, routed),  # type: ignore[misc]
            2 * used * HIDDEN * INNER + 2 * routed * (HIDDEN + INNER),
            2 * routed * HIDDEN * INNER,
        )


def _experts(device: torch.device, routed: int) -> list[Contender]:
    """The loop is given what ours finds out: rows sorted by expert, and how many each has."""
    x = torch.randn(routed, HIDDEN, dtype=HALF, device=device)
    weight = torch.randn(EXPERTS, INNER, HIDDEN, dtype=HALF, device=device)
    ids = (torch.arange(routed, device=device) * EXPERTS // routed).long()
    counts = torch.bincount(ids, minlength=EXPERTS).tolist()
    ends = torch.tensor(counts, device=device).cumsum(0).int()

    def loop() -> torch.Tensor:
        parts = zip(x.split(counts), weight, strict=True)
        return torch.cat([F.linear(rows, expert) for rows, expert in parts if len(rows)])

    def library() -> object:
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)

    return [
        *_against(lambda: grouped_linear(x, weight, ids), loop, "loop"),
        Contender("_grouped_mm", lambda _: library(), False),
    ]


def adapter_rows(device: torch.device) -> Iterator[Row]:
    for tokens in BATCHES:
        yield Row(
            "sgmv",
            f"{ADAPTERS} adapters of rank {RANK}, rows={tokens}",
            lambda tokens=tokens: _adapters(device, tokens),  # type: ignore[misc]
            4 * ADAPTERS * RANK * HIDDEN + 4 * tokens * HIDDEN,
            4 * tokens * RANK * HIDDEN,
        )


def _adapters(device: torch.device, tokens: int) -> list[Contender]:
    x = torch.randn(tokens, HIDDEN, dtype=HALF, device=device)
    a = torch.randn(ADAPTERS, RANK, HIDDEN, dtype=HALF, device=device) / 64
    b = torch.randn(ADAPTERS, HIDDEN, RANK, dtype=HALF, device=device)
    scaling = torch.ones(ADAPTERS, dtype=HALF, device=device)
    ids = (torch.arange(tokens, device=device) * ADAPTERS // tokens).long()
    counts = torch.bincount(ids, minlength=ADAPTERS).tolist()

    def loop() -> torch.Tensor:
        parts = zip(x.split(counts), a, b, strict=True)
        return torch.cat([F.linear(F.linear(rows, down), up) for rows, down, up in parts])

    return _against(lambda: sgmv(x, a, b, ids, scaling), loop, "loop")
