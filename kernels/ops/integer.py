"""The operations of the integer-only decoder, as `integer_<name>`. See reference/integer.py.

Arguments are whole numbers at points that a model was built with; results are int32.
"""

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define
from kernels.reference import integer as reference

WHOLE = (torch.int16, torch.int32, torch.int64)


def _whole(what: str, tensor: torch.Tensor, *accepted: torch.dtype) -> None:
    checks.dtype(f"integer_{what}", tensor, accepted or (torch.int32,))


def _same(values: torch.Tensor) -> Out:
    return Out(values.shape, torch.int32)


def _shift(op: str, shift: int, least: int = 0) -> None:
    checks.need(least <= shift <= 62, f"integer_{op}: shift should be {least} to 62, not {shift}.")


def _point(op: str, point: int) -> None:
    least = reference.EXP_POINT
    checks.need(least <= point <= 62, f"integer_{op}: point should be {least} to 62, not {point}.")


def _factors(op: str, name: str, tensor: torch.Tensor, columns: int) -> None:
    _whole(f"{op}: {name}", tensor, *WHOLE)
    fits = tensor.dim() == 1 and tensor.shape[0] in (1, columns)
    checks.need(
        fits,
        f"integer_{op}: {name} should be [1] or [{columns}], not {list(tensor.shape)}.",
    )


def _requantise(values: torch.Tensor, multiplier: torch.Tensor, shift: torch.Tensor) -> Out:
    _whole("requantise: values", values, *WHOLE)
    checks.need(values.dim() > 0, "integer_requantise: values should be [..., n].")
    for name, tensor in (("multiplier", multiplier), ("shift", shift)):
        _factors("requantise", name, tensor, values.shape[-1])
    return _same(values)


def _quantise(values: torch.Tensor) -> tuple[Out, Out]:
    _whole("quantise: values", values)
    checks.need(
        values.dim() > 0 and values.shape[-1] > 0,
        "integer_quantise: values should be [..., n] of one number at least.",
    )
    return _same(values), Out((*values.shape[:-1], 1), torch.int64)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    multiplier: torch.Tensor,
    shift: int,
    bias: torch.Tensor | None = None,
) -> Out:
    _whole("linear: x", x)
    _whole("linear: weight", weight, torch.int8)
    checks.dims("integer_linear: weight", weight, "[N, K]")
    columns, terms = weight.shape
    checks.need(
        x.dim() > 1 and x.shape[-1] == terms and 0 < terms <= reference.MOST_TERMS,
        f"integer_linear: x should be [.., {terms}] of at most {reference.MOST_TERMS} columns, "
        f"not {list(x.shape)}.",
    )
    _shift("linear", shift, reference.LEAST_LINEAR_SHIFT)
    for name, tensor in (("multiplier", multiplier), ("bias", bias)):
        if tensor is not None:
            checks.shape(f"integer_linear: {name}", tensor, columns)
            _whole(f"linear: {name}", tensor)
    return Out((*x.shape[:-1], columns), torch.int32)


def _softmax(scores: torch.Tensor, visible: torch.Tensor) -> Out:
    _whole("softmax: scores", scores)
    checks.dtype("integer_softmax: visible", visible, (torch.bool,))
    checks.shape("integer_softmax: visible", visible, *scores.shape)
    checks.need(
        scores.dim() > 0 and scores.shape[-1] > 0,
        "integer_softmax: scores should be [..., n] of one number at least.",
    )
    return _same(scores)


def _silu(x: torch.Tensor, point: int) -> Out:
    _whole("silu: x", x)
    _point("silu", point)
    return _same(x)


def _gelu(x: torch.Tensor, point: int) -> Out:
    _whole("gelu: x", x)
    _point("gelu", point)
    return _same(x)


def _gated(gate_up: torch.Tensor, activation: str, point: int, shift: int) -> Out:
    _whole("gated: gate_up", gate_up)
    checks.need(
        activation in reference.ACTIVATIONS,
        f"integer_gated: activation {activation!r} is not known; accepted are "
        f"{', '.join(reference.ACTIVATIONS)}.",
    )
    checks.need(
        gate_up.dim() > 0 and gate_up.shape[-1] % 2 == 0,
        f"integer_gated: gate_up should be [.., 2 n], not {list(gate_up.shape)}.",
    )
    _point("gated", point)
    _shift("gated", shift)
    return Out((*gate_up.shape[:-1], gate_up.shape[-1] // 2), torch.int32)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: int, shift: int) -> Out:
    _whole("rms_norm: x", x)
    _whole("rms_norm: weight", weight)
    checks.need(
        x.dim() > 0 and 0 < x.shape[-1] <= 1 << 16,
        f"integer_rms_norm: x should be [.., 1 to 65536], not {list(x.shape)}.",
    )
    checks.shape("integer_rms_norm: weight", weight, x.shape[-1])
    checks.need(
        1 <= epsilon <= 1 << 60,
        f"integer_rms_norm: epsilon should be 1 to 2 ** 60, not {epsilon}.",
    )
    _shift("rms_norm", shift)
    return _same(x)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shift: int) -> Out:
    _whole("rotate: x", x)
    checks.dims("integer_rotate: x", x, "[tokens, heads, head_dim]")
    checks.need(
        x.shape[2] % 2 == 0, f"integer_rotate: heads should be of an even size, not {x.shape[2]}."
    )
    for name, table in (("cos", cos), ("sin", sin)):
        checks.shape(f"integer_rotate: {name}", table, x.shape[0], 1, x.shape[2] // 2)
        _whole(f"rotate: {name}", table)
    _shift("rotate", shift)
    return _same(x)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, multiplier: int, shift: int
) -> Out:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _whole(f"attention: {name}", tensor, torch.int16, torch.int32)
        checks.dims(f"integer_attention: {name}", tensor, f"[{name}'s tokens, heads, head_dim]")
    checks.shape("integer_attention: v", v, *k.shape)
    checks.heads("integer_attention", q, k.shape[1])
    checks.need(
        q.shape[2] == k.shape[2] < 1 << 10 and q.shape[0] <= k.shape[0] < 1 << 17,
        f"integer_attention: q {list(q.shape)} should be the last tokens of k {list(k.shape)}, in "
        "heads of the same size below 1024 and a context below 2 ** 17.",
    )
    _shift("attention", shift)
    return _same(q)


integer_requantise = define(reference.integer_requantise, _requantise, "integer")
integer_quantise = define(reference.quantise, _quantise, "integer", name="integer_quantise")
integer_linear = define(reference.linear, _linear, "integer", name="integer_linear")
integer_softmax = define(reference.softmax, _softmax, "integer", name="integer_softmax")
integer_silu = define(reference.silu, _silu, "integer", name="integer_silu")
integer_gelu = define(reference.gelu, _gelu, "integer", name="integer_gelu")
integer_gated = define(reference.gated, _gated, "integer", name="integer_gated")
integer_rms_norm = define(reference.rms_norm, _rms_norm, "integer", name="integer_rms_norm")
integer_rotate = define(reference.rotate, _rotate, "integer", name="integer_rotate")
integer_attention = define(reference.attention, _attention, "integer", name="integer_attention")
