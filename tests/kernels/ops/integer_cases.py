"""The integer-only ops' part of the table: inputs, and oracles in NumPy's int64 and Python integers
(tests/models/integer_numpy.py, which shares nothing with `kernels`)."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kernels.ops import integer as ops
from tests.kernels.ops.cases import EXACT, Case, Source
from tests.models import integer_numpy as model

TOP = (1 << 31) - 1
ERF_B, ERF_ONE = round(1.769 * 2**14), round(2**28 / 0.2888)


def drawn(s: Source, *shape: int, most: int = TOP) -> torch.Tensor:
    return s.whole(-most, most + 1, *shape).int()


def unlike(s: Source, rows: int, columns: int) -> torch.Tensor:
    """Rows from zeros to the ends of int32."""
    bits = torch.tensor([31, 0, 3, 8, 12, 17, 20, 23, 28])[torch.arange(rows) % 9, None]
    return (drawn(s, rows, columns) >> (31 - bits)).int()


def plain(made: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.from_numpy(np.asarray(made, dtype=np.int64)).to(dtype)


def requantise(values, multiplier, shift):
    product = model.array(values) * model.array(multiplier)
    return plain(model.saturated(model.rounded(product, model.array(shift)), 32))


def quantise(values):
    if not len(values):
        return values, torch.zeros(0, 1, dtype=torch.int64)
    short, shifts = model.fifteen_bits(model.array(values))
    return plain(short), plain(shifts.reshape(-1, 1), torch.int64)


def linear(x, weight, multiplier, shift, bias=None):
    if not len(x):
        return torch.zeros(0, len(weight), dtype=torch.int32)
    matrix = SimpleNamespace(weight=weight, multiplier=multiplier, shift=shift, bias=bias)
    return plain(model.linear(model.array(x), matrix))


def softmax(scores, visible):
    made = np.zeros(scores.shape, dtype=np.int64)
    for row in range(len(scores)):
        seen = visible[row].numpy()
        if seen.any():
            values = model.array(scores[row])[seen]
            weights = model.exp(values - values.max())
            made[row, seen] = weights * 2**30 // weights.sum()
    return plain(made)


def silu(x, point):
    return plain(model.silu(model.array(x), point))


def gelu(x, point):
    """x times (1 + erf(x / sqrt 2)) / 2, number by number."""

    def one(value: int) -> int:
        size = abs(int(model.saturated(model.rounded(np.int64(value), point - 14), 32)))
        scaled = (size * round(2**14 / 2**0.5) + 2**13) >> 14
        erf = ERF_ONE - (min(scaled, ERF_B) - ERF_B) ** 2
        # Of a number that rounds to zero at point 14, the function is one half.
        share = (ERF_ONE + (0 if size == 0 else erf if value > 0 else -erf)) * 2**29 // ERF_ONE
        return (value * share + 2**29) >> 30

    return plain([[one(int(value)) for value in row] for row in x]).view(x.shape)


def gated(gate_up, activation, point, shift):
    gate, up = gate_up.chunk(2, 1)
    active = {"silu": silu, "gelu": gelu}[activation](gate, point)
    product = model.array(active) * model.array(up)
    return plain(model.saturated(model.rounded(product, shift), 32))


def rms_norm(x, weight, epsilon, shift):
    made = model.rms_norm(model.array(x), model.array(weight), epsilon, shift)
    return plain(made).view(x.shape)


def rotate(x, cos, sin, shift):
    return plain(model.rotated(model.array(x), *(model.array(t[:, 0]) for t in (cos, sin)), shift))


def attention(q, k, v, multiplier, shift):
    """The queries of the last tokens; those before them are asked nothing."""
    before = len(k) - len(q)
    every = torch.cat((torch.zeros(before, *q.shape[1:], dtype=q.dtype), q))
    made = model.attention(*(model.array(each) for each in (every, k, v)), multiplier, shift)
    return plain(made[before:])


def linear_case(s: Source, rows: int) -> tuple[Any, ...]:
    weight = s.whole(-127, 128, 21, 40, dtype=torch.int8)
    return unlike(s, rows, 40), weight, drawn(s, 21, most=1 << 24), 34, drawn(s, 21)


def softmax_case(s: Source, rows: int) -> tuple[Any, ...]:
    visible = s.whole(0, 3, rows, 19) > 0
    visible[2:3] = False
    return drawn(s, rows, 19, most=1 << 17), visible


def rotate_case(s: Source, rows: int) -> tuple[Any, ...]:
    tables = (drawn(s, rows, 1, 8, most=1 << 15) for _ in range(2))
    return drawn(s, rows, 3, 16, most=1 << 20), *tables, 22


def attention_case(s: Source, rows: int) -> tuple[Any, ...]:
    k, v = (drawn(s, rows + 3, 2, 24, most=16383).short() for _ in range(2))
    return drawn(s, rows, 4, 24, most=16383), k, v, (1 << 23) + 5, 36


def near_zero(s: Source, rows: int, columns: int) -> torch.Tensor:
    return drawn(s, rows, columns, most=6 << 18)


def case(name: str, op: Any, make: Any, oracle: Any) -> Case:
    return Case(f"integer_{name}", op, make, oracle, EXACT)


CASES = (
    case(
        "requantise",
        ops.integer_requantise,
        lambda s, rows: (unlike(s, rows, 23), drawn(s, 23, most=1 << 24), s.whole(0, 40, 23)),
        requantise,
    ),
    case("quantise", ops.integer_quantise, lambda s, rows: (unlike(s, rows, 23),), quantise),
    case("linear", ops.integer_linear, linear_case, linear),
    case("softmax", ops.integer_softmax, softmax_case, softmax),
    case("silu", ops.integer_silu, lambda s, rows: (near_zero(s, rows, 9), 18), silu),
    case("gelu", ops.integer_gelu, lambda s, rows: (near_zero(s, rows, 9), 18), gelu),
    *(
        case(
            f"gated/{name}",
            ops.integer_gated,
            lambda s, rows, name=name: (near_zero(s, rows, 18), name, 18, 20),
            gated,
        )
        for name in ("silu", "gelu")
    ),
    case(
        "rms_norm",
        ops.integer_rms_norm,
        lambda s, rows: (unlike(s, rows, 33), drawn(s, 33, most=1 << 20), 12345, 28),
        rms_norm,
    ),
    case("rotate", ops.integer_rotate, rotate_case, rotate),
    case("attention", ops.integer_attention, attention_case, attention),
)
# Changes that the oracle of the unchanged arguments must tell, as CHANGES of test_conformance.py.
CHANGES: dict[str, Any] = {
    "integer_requantise": (1, lambda multiplier: multiplier + 1),
    "integer_quantise": (0, lambda values: values.flip(0)),
    "integer_linear": (3, lambda shift: shift + 1),
    "integer_softmax": (1, lambda visible: visible.flip(0)),
    "integer_silu": (1, lambda point: point + 1),
    "integer_gelu": (1, lambda point: point + 1),
    "integer_gated": (3, lambda shift: shift + 1),
    "integer_rms_norm": (3, lambda shift: shift + 1),
    "integer_rotate": (2, torch.neg),
    "integer_attention": (3, lambda multiplier: multiplier // 2),
}
WIDE = torch.zeros(2, 8, dtype=torch.int32)
REFUSED = {
    "integer_linear: shift should be 18 to 62, not 17": lambda: ops.integer_linear(
        WIDE, WIDE.to(torch.int8), WIDE[:, 0], 17
    ),
    "integer_quantise: values is torch.float32": lambda: ops.integer_quantise(WIDE.float()),
    "'relu' is not known; accepted are silu, gelu": lambda: ops.integer_gated(WIDE, "relu", 18, 3),
    "integer_silu: point should be 14 to 62, not 13": lambda: ops.integer_silu(WIDE, 13),
    r"epsilon should be 1 to 2 \*\* 60, not 0": lambda: ops.integer_rms_norm(WIDE, WIDE[0], 0, 3),
    "visible is torch.int32": lambda: ops.integer_softmax(WIDE, WIDE),
    r"shift should be \[1\] or \[8\], not \[2\]": lambda: ops.integer_requantise(
        WIDE, WIDE[0], WIDE[:, 0]
    ),
    "of an even size, not 7": lambda: ops.integer_rotate(
        WIDE[:, None, :7], WIDE[:, None, :3], WIDE[:, None, :3], 3
    ),
    "should be the last tokens of k": lambda: ops.integer_attention(
        WIDE[:, None], WIDE[:1, None], WIDE[:1, None], 1, 3
    ),
}
