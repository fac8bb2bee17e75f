"""Written-out gradients against autograd's of the same formulas in plain torch, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train import fused

Of = Callable[..., Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def plain_project(x: Tensor, *weights: Tensor) -> Tensor:
    return torch.cat([x @ weight.T for weight in weights], -1)


def plain_swiglu(joined: Tensor) -> Tensor:
    gate, up = joined.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def turned(x: Tensor) -> Tensor:
    """By complex numbers: each pair of halves times e^(i angle)."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]).double(), (torch.arange(half) / 7).double())
    whole = torch.complex(x[..., :half], x[..., half:])
    whole = whole * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([whole.real, whole.imag], -1)


def fused_turned(x: Tensor) -> Tensor:
    half = torch.arange(x.shape[-1] // 2) / 7
    angles = torch.outer(torch.arange(x.shape[1]).double(), half.double())
    return fused.rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Head by head."""
    tokens, heads = query.shape[1:3]
    group, outs = heads // key.shape[2], []
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    for head in range(heads):
        scores = query[:, :, head] @ key[:, :, head // group].mT / query.shape[-1] ** 0.5
        shares = scores.masked_fill(later, -torch.inf).softmax(-1)
        outs.append(shares @ value[:, :, head // group])
    return torch.stack(outs, 2)


def attention_inputs(tokens: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    return (
        normal(2, tokens, heads, 8),
        normal(2, tokens, kv_heads, 8),
        normal(2, tokens, kv_heads, 8),
    )


def differences(mine: Of, plain: Of, inputs: tuple[Tensor, ...]) -> list[float]:
    """Largest ones of the value and of the gradients, relative to the largest number there."""
    expected = plain(*inputs)
    given = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, inputs, given)]
    value = mine(*inputs)
    found = [value, *torch.autograd.grad(value, inputs, given)]
    pairs = zip(found, wanted, strict=True)
    return [float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs]


CASES: dict[str, tuple[Of, Of, Callable[[], tuple[Tensor, ...]]]] = {
    "norm": (
        lambda x, weight: fused.rms_norm(x, weight, 1e-5),
        plain_norm,
        lambda: (normal(2, 5, 24), normal(24)),
    ),
    "project": (
        fused.project,
        plain_project,
        lambda: (normal(2, 5, 8), normal(6, 8), normal(3, 8), normal(4, 8)),
    ),
    "swiglu": (fused.swiglu, plain_swiglu, lambda: (normal(2, 5, 12),)),
    "rotate": (fused_turned, turned, lambda: (normal(2, 9, 3, 8),)),
    "attention": (fused.attention, plain_attention, lambda: attention_inputs(17, 4, 4)),
    "groups": (fused.attention, plain_attention, lambda: attention_inputs(9, 6, 2)),
    "blocks": (fused.attention, plain_attention, lambda: attention_inputs(300, 4, 2)),
    "long": (fused.attention, plain_attention, lambda: attention_inputs(520, 2, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_autograds(case: str):
    torch.manual_seed(3)
    mine, plain, inputs = CASES[case]
    assert max(differences(mine, plain, inputs())) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_near(case: str):
    """Within a few roundings of 2^-8 of the largest number."""
    torch.manual_seed(4)
    mine, plain, inputs = CASES[case]
    rounded = [x.detach().bfloat16() for x in inputs()]
    narrow = tuple(x.clone().requires_grad_() for x in rounded)
    wide = tuple(x.double().requires_grad_() for x in rounded)
    expected = plain(*wide)
    given = torch.randn_like(expected).bfloat16()
    wanted = [expected, *torch.autograd.grad(expected, wide, given.double())]
    value = mine(*narrow)
    found = [value, *torch.autograd.grad(value, narrow, given)]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b).detach().abs().max() / b.detach().abs().max()) < 0.03


def test_attention_that_sees_later_keys_is_noticed(monkeypatch):
    """The mutation: no mask in the gradient."""
    torch.manual_seed(5)
    zeros = lambda start, stop, group, dtype: torch.zeros((stop - start) * group, stop, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(fused, "_later", zeros)
    inputs = attention_inputs(9, 2, 2)
    assert max(differences(fused.attention, plain_attention, inputs)) > 1e-2


def test_a_gradient_leaves_what_it_was_computed_from():
    """With one key head nothing has to be moved, so nothing is copied; asked twice, it is the
    same."""
    inputs = attention_inputs(9, 4, 1)
    kept = [x.detach().clone() for x in inputs]
    value = fused.attention(*inputs)
    given = torch.randn_like(value)
    once = torch.autograd.grad(value, inputs, given, retain_graph=True)
    again = torch.autograd.grad(value, inputs, given)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs, strict=True))


def test_matrices_below_each_other_are_not_copied():
    flat = torch.randn(100)
    first, second = flat[4:28].view(4, 6), flat[28:40].view(2, 6)
    joined = fused._joined((first, second))
    assert joined.data_ptr() == first.data_ptr()
    assert torch.equal(joined, torch.cat([first, second]))
    for apart in ((second, first), (first, flat[40:52].view(2, 6)), (first, torch.randn(2, 6))):
        joined = fused._joined(apart)
        assert joined.data_ptr() != apart[0].data_ptr()
        assert torch.equal(joined, torch.cat(apart))


def test_no_gradient_is_taken_twice():
    x = normal(2, 4)
    (gradient,) = torch.autograd.grad(fused.swiglu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_layers_use_them():
    """A Llama's products forward: four for each layer, where parts apart have seven, and the
    head."""
    from tests.train import tiny
    from train.weights import build_model, read_start

    job = tiny.job()
    model = build_model(job, read_start(job))
    seen, old = 0, functional.linear

    def counted(*inputs: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        return old(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", counted)
        model(torch.zeros(1, 8, dtype=torch.long))
    assert seen == 4 * job.model.layers + 1
