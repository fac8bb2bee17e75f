"""Attention over prompts and over pages, against torch's scaled_dot_product_attention on keys and
values that lie side by side. Called by `__main__`."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.reference.kv_cache import read_cache
from kernels.triton.attention_paged import paged_attention
from kernels.triton.attention_prefill import prefill_attention
from kernels.triton.bench.measure import Contender, Row, copies_for, relative_error
from kernels.triton.kv_cache import kv_write, meta_cache

HEADS, KV_HEADS, WIDTH, PAGE_TOKENS = 32, 8, 128, 16
PROMPTS = (1024, 4096, 16384)
STREAMS, CONTEXTS = (1, 16, 64), (1024, 8192, 32768)
CACHES = ("float", "int8", "int4")
# Of a value: what a cache takes for it, with its scales.
VALUE_BYTES = {"float": 2.0, "int8": 1 + 4 / WIDTH, "int4": 4.5 / 8 + 2 / 32}
HALF = torch.bfloat16


def prompt_rows(device: torch.device) -> Iterator[Row]:
    for tokens in PROMPTS:
        yield Row(
            "prefill_attention",
            f"T={tokens}",
            lambda tokens=tokens: _prompt(device, tokens),  # type: ignore[misc]
            2 * tokens * WIDTH * (2 * HEADS + 2 * KV_HEADS),
            2 * tokens * tokens * HEADS * WIDTH,
        )


def _prompt(device: torch.device, tokens: int) -> list[Contender]:
    q = torch.randn(tokens, HEADS, WIDTH, dtype=HALF, device=device)
    k, v = (torch.randn(tokens, KV_HEADS, WIDTH, dtype=HALF, device=device) for _ in range(2))
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)

    def call(_: int) -> torch.Tensor:
        return prefill_attention(q, k, v, starts)

    def peer(backend: SDPBackend) -> torch.Tensor:
        query, key, value = (each.transpose(0, 1)[None] for each in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    def check() -> float:
        return relative_error(call(0), peer(SDPBackend.FLASH_ATTENTION))

    return [
        Contender("ours", call, True, check=check),
        Contender("sdpa-flash", lambda _: peer(SDPBackend.FLASH_ATTENTION), False),
        Contender("sdpa-cudnn", lambda _: peer(SDPBackend.CUDNN_ATTENTION), False),
    ]


def paged_rows(device: torch.device) -> Iterator[Row]:
    """Ours are of three forms of cache; the row's bytes are those of float16."""
    for streams in STREAMS:
        for context in CONTEXTS:
            yield Row(
                "paged_attention",
                f"S={streams} context={context}",
                lambda s=streams, c=context: _paged(device, s, c),  # type: ignore[misc]
                int(2 * streams * context * KV_HEADS * WIDTH * VALUE_BYTES["float"]),
                4 * streams * context * HEADS * WIDTH,
            )


def _paged(device: torch.device, streams: int, context: int) -> list[Contender]:
    q = torch.randn(streams, HEADS, WIDTH, dtype=HALF, device=device)
    k, v = (
        torch.randn(streams, context, KV_HEADS, WIDTH, dtype=HALF, device=device) for _ in range(2)
    )
    ours = [_cached(kind, q, k, v) for kind in CACHES]
    key, value = k.transpose(1, 2), v.transpose(1, 2)

    def peer(_: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], key, value, enable_gqa=True)

    return [*ours, Contender("sdpa", peer, False)]


def splits_for(device: torch.device, streams: int, context: int) -> int:
    """Parts of a context, so that there are about two programs for each multiprocessor, none with
    fewer than 256 tokens."""
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-2 * units // (streams * KV_HEADS)), context // 256))


def _cached(kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    """Over pages in random order, that kv_write has filled."""
    streams, context = k.shape[:2]
    device, pages = q.device, streams * context // PAGE_TOKENS
    order = torch.randperm(pages, device=device)
    slots = (order[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=device)).flatten()
    sides = []
    for bits in (5, 4):  # of keys and of values where they are packed
        numbers, scales = meta_cache(kind, HALF, pages, PAGE_TOKENS, KV_HEADS, WIDTH, bits)
        made = None if scales is None else torch.empty_like(scales, device=device)
        sides.append((torch.empty_like(numbers, device=device), made))
    (keys, key_scales), (values, value_scales) = sides
    kv_write(k.flatten(0, 1), v.flatten(0, 1), slots, keys, values, key_scales, value_scales)
    tables = order.view(streams, -1).int()
    contexts = torch.full((streams,), context, dtype=torch.int32, device=device)
    splits = splits_for(device, streams, context)
    copies = copies_for(int(2 * k.numel() * VALUE_BYTES[kind]))
    filled = [(keys, values)]
    filled += [(keys.clone(), values.clone()) for _ in range(copies - 1)]

    def call(i: int) -> torch.Tensor:
        each = filled[i]
        return paged_attention(q, *each, key_scales, value_scales, tables, contexts, 0, splits)

    def check() -> float:
        one = tables[0].long()
        k0, v0 = (
            read_cache(side[one], None if scales is None else scales[one]).flatten(0, 1)
            for side, scales in sides
        )
        key, value = (each.transpose(0, 1)[None] for each in (k0, v0))
        query = q[:1, :, None].float()
        wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return relative_error(call(0)[:1], wanted[:, :, 0])

    return Contender(f"{kind}-kv/{splits}", call, True, len(filled), check)
