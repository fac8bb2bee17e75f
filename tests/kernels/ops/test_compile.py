"""Ops inside torch.compile: one graph without breaks, the same results, gradients included.

The backend is aot_eager, which traces as inductor does and compiles no C++. Slow, since tracing is.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels.ops.attention_paged import paged_attention
from kernels.ops.gated import gated
from kernels.ops.kv_cache import kv_write
from kernels.ops.linear_w4 import w4_linear
from kernels.ops.lora_batched import sgmv
from kernels.ops.moe import grouped_linear, moe_align
from kernels.ops.norm import rms_norm_residual
from kernels.ops.rope import rope
from kernels.ops.sampling import sample
from kernels.ops.scan import selective_scan
from tests.kernels.ops.cases import (
    PAGE,
    Source,
    caches,
    four,
    grouped_case,
    rope_case,
    sample_case,
    scan_case,
    sgmv_case,
)

pytestmark = pytest.mark.slow


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=True), counter


def block(x, residual, norm, q, scales, mins, down):
    """The feed-forward of a layer, as a decoder would write it."""
    normed, residual = rms_norm_residual(x, residual, norm, 1e-5)
    opened = gated(w4_linear(normed, q, scales, mins), "silu")
    return residual + opened @ down


def block_inputs(rows: int) -> list[torch.Tensor]:
    s = Source(rows, torch.float32)
    weight = four(s, 48, 64, 32, False)
    return [s.normal(rows, 64), s.normal(rows, 64), s.normal(64), *weight, s.normal(24, 64)]


def test_a_feed_forward_is_one_graph_forwards_and_backwards():
    fast, counter = compiled(block)
    for rows in (5, 9, 17):
        eager = block_inputs(rows)
        traced = [each.clone() for each in eager]
        for args in (eager, traced):
            for place in (0, 1, 2, 6):
                args[place].requires_grad_()
        wanted, got = block(*eager), fast(*traced)
        assert torch.equal(got, wanted)
        wanted.square().sum().backward()
        got.square().sum().backward()
        for place in (0, 1, 2, 6):
            right, mine = eager[place].grad, traced[place].grad
            assert right is not None and mine is not None
            assert torch.allclose(mine, right, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def attention(q, k, v, cos, sin, slots, keys, values, key_scales, value_scales, tables, contexts):
    q, k = rope(q, k, cos, sin)
    kv_write(k, v, slots, keys, values, key_scales, value_scales)
    return paged_attention(q, keys, values, key_scales, value_scales, tables, contexts, splits=2)


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_a_write_in_place_comes_before_the_read(kind: str):
    fast, counter = compiled(attention)
    for rows in (3, 6):
        s = Source(rows, torch.float32)
        angles = s.plain(rows, 16) * 6
        tables = torch.arange(rows, dtype=torch.int32)[:, None]
        slots = tables[:, 0].long() * PAGE + 4
        cache = caches(s, kind, 8, PAGE, 2, 32)
        fresh = s.normal(rows, 4, 32), s.normal(rows, 2, 32), s.normal(rows, 2, 32)
        contexts = torch.full((rows,), 5, dtype=torch.int32)
        results = []
        for run in (attention, fast):
            mine: list[Any] = [each if each is None else each.clone() for each in cache]
            args: list[Any] = [*fresh, angles.cos(), angles.sin(), slots, *mine, tables, contexts]
            out = run(*args)
            results.append((out, *(each for each in mine if each is not None)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert not torch.equal(results[0][1], cache[0])
    assert counter.frame_count == 1


def experts(x, weight, ids, a, b, adapters, scaling):
    rows, owners, used = moe_align(ids[:, None], 5, 4)
    return grouped_linear(x, weight, ids), sgmv(x, a, b, adapters, scaling), rows, owners, used


def test_experts_and_adapters_are_one_graph():
    fast, counter = compiled(experts)
    for rows in (8, 17, 30):
        s = Source(rows, torch.float32)
        x, weight, ids = grouped_case(s, rows)
        args = x, weight, ids, *sgmv_case(s, rows)[1:]
        for got, wanted in zip(fast(*args), experts(*args), strict=True):
            assert torch.equal(got, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "op,make",
    [
        (rope, rope_case),
        (sample, sample_case),
        (selective_scan, lambda s, rows: scan_case(s, rows, True)),
    ],
)
def test_an_op_alone_is_one_graph(op, make):
    fast, counter = compiled(lambda *args: op(*args))
    # No other size is 13: torch takes equal sizes for one and the same.
    for rows in (13, 7):
        args = make(Source(rows, torch.float32), rows)
        got, wanted = fast(*args), op(*args)
        pairs = [(got, wanted)] if isinstance(got, torch.Tensor) else zip(got, wanted, strict=True)
        assert all(torch.equal(mine, right) for mine, right in pairs)
    assert counter.frame_count == 1


def test_a_scan_is_traced_backwards():
    fast, _ = compiled(lambda *args: selective_scan(*args)[0])
    grads = []
    for run in (fast, lambda *args: selective_scan(*args)[0]):
        args = [each.requires_grad_() for each in scan_case(Source(0, torch.float32), 5, True)]
        run(*args).square().sum().backward()
        grads.append([each.grad for each in args])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_wrong_shape_is_named_while_tracing():
    fast, _ = compiled(block)
    args = block_inputs(5)
    args[1] = args[1][:4]
    with pytest.raises(Exception, match=r"rms_norm_residual: residual should be \["):
        fast(*args)


def test_export_keeps_the_op():
    class Module(torch.nn.Module):
        def forward(self, x, q, scales, mins):
            return w4_linear(x, q, scales, mins)

    s = Source(0, torch.float32)
    args = s.normal(5, 64), *four(s, 9, 64, 32, False)
    program = torch.export.export(Module(), args)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "sanderling.w4_linear.default" in targets
    assert torch.equal(program.module()(*args), w4_linear(*args))
