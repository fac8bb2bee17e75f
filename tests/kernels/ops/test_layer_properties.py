"""Norms, rotations, gates and the scan, beside transformers and by what defines them."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from kernels.ops.gated import gated
from kernels.ops.norm import rms_norm, rms_norm_residual
from kernels.ops.rope import rope
from kernels.ops.scan import selective_scan
from kernels.reference.rope import Rotation, rotate
from kernels.reference.swiglu import swiglu
from tests.kernels.ops.cases import Source, scan_case
from tests.kernels.ops.measure import agree, error


def source(dtype: torch.dtype = torch.float32) -> Source:
    return Source(0, dtype)


def test_the_norm_is_that_of_transformers():
    s = source()
    theirs = LlamaRMSNorm(48, 1e-5)
    theirs.weight.data = s.normal(48)
    x = s.normal(17, 48)
    agree(rms_norm(x, theirs.weight.detach(), 1e-5), theirs(x).detach().double())


def test_the_norm_does_not_see_the_size_of_a_row():
    s = source()
    x, weight = s.normal(5, 48), s.normal(48)
    assert torch.equal(rms_norm(8 * x, weight, 0.0), rms_norm(x, weight, 0.0))
    assert not torch.equal(rms_norm(8 * x, weight, 0.1), rms_norm(x, weight, 0.1))
    assert not rms_norm(0 * x, weight, 1e-5).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_residual_is_added_before_the_norm_and_handed_on(dtype: torch.dtype):
    s = source(dtype)
    x, residual, weight = s.normal(17, 48), s.normal(17, 48), s.normal(48)
    y, added = rms_norm_residual(x, residual, weight, 1e-5)
    assert torch.equal(added, x + residual)
    assert torch.equal(y, rms_norm(added, weight, 1e-5))


def angles(positions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    turns = positions[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    return turns.cos(), turns.sin()


def test_the_rotation_is_that_of_transformers_and_of_the_decoder():
    s = source()
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, head_dim=32)
    q, k, positions = s.normal(9, 4, 32), s.normal(9, 2, 32), torch.arange(3, 12)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    ours = rope(q, k, *angles(positions, 32))
    for mine, yours in zip(ours, theirs, strict=True):
        agree(mine, yours[0].transpose(0, 1).double(), torch.float32)
    half_cos, half_sin = angles(positions, 32)
    full = torch.cat((half_cos, half_cos), -1), torch.cat((-half_sin, half_sin), -1)
    agree(ours[0], rotate(q, Rotation(full[0][:, None], full[1][:, None])).double())


def test_a_rotation_keeps_lengths_and_shows_distances_only():
    s = source(torch.float64)
    q, k = s.normal(1, 4, 32).expand(12, 4, 32), s.normal(1, 4, 32).expand(12, 4, 32)
    turned_q, turned_k = rope(q, k, *angles(torch.arange(12).double(), 32))
    agree(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = torch.einsum("ihd,jhd->hij", turned_q, turned_k)
    agree(scores[:, 1:, 1:].contiguous(), scores[:, :-1, :-1])
    assert error(scores[:, 1:, 1:], scores[:, 1:, :-1]).rms > 0.01
    assert torch.equal(turned_q[0], q[0])


def test_gates_are_those_of_transformers_and_of_the_decoder():
    s = source()
    for activation, name in (("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")):
        config = LlamaConfig(
            hidden_size=16, num_attention_heads=2, intermediate_size=24, hidden_act=name
        )
        theirs = LlamaMLP(config)
        x = s.normal(5, 16)
        wanted = theirs(x).detach()
        both = torch.cat((theirs.gate_proj(x), theirs.up_proj(x)), dim=-1).detach()
        opened = gated(both, activation)
        agree(theirs.down_proj(opened).detach(), wanted.double())
    x = s.normal(5, 26)
    agree(gated(x, "silu"), swiglu(x.double()))
    assert error(gated(x, "gelu_tanh"), swiglu(x.double())).rms > 0.01


@pytest.mark.parametrize("cut", [0, 1, 6, 12])
def test_a_scan_goes_on_from_its_state(cut: int):
    x, dt, a, b, c, d, first = scan_case(source(), 12, True)
    whole, last = selective_scan(x, dt, a, b, c, d, first)
    before, state = selective_scan(x[:, :cut], dt[:, :cut], a, b[:, :cut], c[:, :cut], d, first)
    after, end = selective_scan(x[:, cut:], dt[:, cut:], a, b[:, cut:], c[:, cut:], d, state)
    assert torch.equal(torch.cat((before, after), dim=1), whole) and torch.equal(end, last)
    fresh, _ = selective_scan(x[:, cut:], dt[:, cut:], a, b[:, cut:], c[:, cut:], d)
    assert cut == 12 or not torch.allclose(fresh, whole[:, cut:], atol=1e-3)


def test_a_scan_without_decay_is_a_running_sum():
    """exp(0) is 1; with steps of length 0 nothing enters, and the state stays."""
    x, dt, a, b, c, d, first = scan_case(source(torch.float64), 12, True)
    sums = torch.cumsum((dt * x)[..., None] * b[:, :, None], dim=1) + first[:, None]
    y, last = selective_scan(x, dt, 0 * a, b, c, d, first)
    agree(y, (sums * c[:, :, None]).sum(-1) + d * x)
    agree(last, sums[:, -1])
    y, last = selective_scan(x, 0 * dt, a, b, c, d, first)
    assert torch.equal(last, first)
    agree(y, torch.einsum("bdn,bln->bld", first, c) + d * x)


def test_sequences_and_channels_of_a_scan_do_not_meet():
    x, dt, a, b, c, d, first = scan_case(source(), 12, True)
    y, last = selective_scan(x, dt, a, b, c, d, first)
    for batch in range(2):
        one = slice(batch, batch + 1)
        alone = selective_scan(x[one], dt[one], a, b[one], c[one], d, first[one])
        assert torch.equal(alone[0], y[one]) and torch.equal(alone[1], last[one])
    order = torch.tensor([4, 2, 0, 1, 3])
    turned = selective_scan(
        x[..., order], dt[..., order], a[order], b, c, d[order], first[:, order]
    )
    assert torch.equal(turned[0], y[..., order]) and torch.equal(turned[1], last[:, order])


def test_a_scan_keeps_its_state_in_float32():
    """Many small steps that bfloat16 would round away: 1 + 1000 * 2 ** -10."""
    ones = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    state = torch.ones(1, 1, 1)
    _, last = selective_scan(
        ones, ones / 1024, torch.zeros(1, 1), ones, ones, torch.zeros(1), state
    )
    assert last.item() == 1 + 1000 / 1024
