"""What must hold of products with quantised and sparse weights, beyond being near their oracle."""

import gguf
import numpy as np
import pytest
import torch

from kernels.formats import FORMATS
from kernels.ops.gguf_split import dequantize_blocks, from_gguf
from kernels.ops.linear_fp8 import fp8_linear
from kernels.ops.linear_int8 import int8_linear, int8_matmul, quantize_rowwise_int8
from kernels.ops.linear_nm import nm_linear, nm_pack
from kernels.ops.linear_w4 import dequantize_w4, w4_linear
from kernels.ops.linear_w8 import dequantize_w8, w8_linear
from kernels.reference import gguf_split
from kernels.reference.dequantize import dequantize
from tests.kernels.ops.cases import Source, eight, four
from tests.kernels.ops.measure import agree, error

SPLIT = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")


def source(seed: int = 0, dtype: torch.dtype = torch.float32) -> Source:
    return Source(seed, dtype)


def random_blocks(form: str, blocks: int) -> torch.Tensor:
    """Every byte pattern: scales may be infinite, subnormal or NaN."""
    size = FORMATS[form].block_bytes
    return source(blocks).whole(0, 256, blocks * size, dtype=torch.uint8)


def rebuilt(form: str, stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix through its planes."""
    split = from_gguf(stored, form, rows, columns)
    if split.qweight.dtype == torch.uint8:
        return dequantize_w4(*split, torch.float32)
    assert split.mins is None
    return dequantize_w8(split.qweight, split.scales, torch.float32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    real = ~a.isnan()
    return torch.equal(b.isnan(), ~real) and torch.equal(
        a[real].view(torch.int32), b[real].view(torch.int32)
    )


@pytest.mark.parametrize("form", SPLIT)
def test_a_split_matrix_has_the_bits_of_the_stored_one(form: str):
    rows, columns = 6, 2 * FORMATS[form].block_values
    stored = random_blocks(form, 12)
    with np.errstate(all="ignore"):
        raw = stored.numpy().reshape(12, -1)
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[form])
    wanted = torch.from_numpy(np.ascontiguousarray(values)).view(rows, columns)
    ours = dequantize(stored, form, torch.empty(rows, columns))
    split = rebuilt(form, stored, rows, columns)
    assert same_bits(wanted, ours) and same_bits(wanted, split)
    assert same_bits(wanted, dequantize_blocks(stored, form, torch.float32).view(rows, columns))


@pytest.mark.parametrize("form", SPLIT)
def test_a_lost_bit_of_a_split_matrix_is_seen(form: str, monkeypatch):
    """The check above, when one plane is off by the least there is."""
    stored = random_blocks(form, 12)
    wanted = dequantize(stored, form, torch.empty(6, 2 * FORMATS[form].block_values))
    split = gguf_split._SPLITTERS[form]

    def off(blocks):
        qweight, scales, mins = split(blocks)
        return qweight, torch.nextafter(scales, scales.new_tensor(torch.inf)), mins

    monkeypatch.setitem(gguf_split._SPLITTERS, form, off)
    assert not same_bits(wanted, rebuilt(form, stored, *wanted.shape))


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="'F16' is not split.*Q4_K, Q6_K"):
        from_gguf(torch.zeros(64, dtype=torch.uint8), "F16", 1, 32)
    with pytest.raises(ValueError, match="multiple of 256 columns, not 32"):
        from_gguf(torch.zeros(144, dtype=torch.uint8), "Q4_K", 8, 32)
    with pytest.raises(ValueError, match="are 36 bytes in one dimension"):
        from_gguf(torch.zeros(35, dtype=torch.uint8), "Q4_0", 2, 32)


def test_one_hot_rows_read_the_weight_back():
    """Nothing but one value is added, so its bits come back: for each layout of weights."""
    s = source()
    eye = torch.eye(128)
    for group in (32, 64, 128):
        for symmetric in (True, False):
            weight = four(s, 9, 128, group, symmetric)
            q, scales, mins = weight
            wanted = dequantize_w4(q, scales, mins, torch.float32)
            assert torch.equal(w4_linear(eye, *weight).T, wanted)
    for group in (16, 128):
        q, scales = eight(s, 9, 128, group)
        wanted = dequantize_w8(q, scales, torch.float32)
        assert torch.equal(w8_linear(eye, q, scales).T, wanted)
    values, indices = nm_pack(s.normal(9, 128), 2, 4)
    picked = nm_linear(eye, values, indices, 2, 4).T
    assert torch.equal(picked[picked != 0], values.flatten())


@pytest.mark.parametrize("symmetric", [True, False])
def test_products_are_linear_in_their_scales(symmetric: bool):
    """A power of two changes no digit."""
    s = source()
    x, (q, scales, mins) = s.normal(5, 96), four(s, 7, 96, 32, symmetric)
    once = w4_linear(x, q, scales, mins)
    assert torch.equal(w4_linear(x, q, 4 * scales, mins if mins is None else 4 * mins), 4 * once)
    q, scales = eight(s, 7, 96, 16)
    assert torch.equal(w8_linear(x, q, scales / 8), w8_linear(x, q, scales) / 8)


def test_groups_may_stand_in_any_order():
    s = source()
    order = torch.tensor([2, 0, 3, 1])
    x = s.normal(5, 128)
    moved = x.view(5, 4, 32)[:, order].reshape(5, 128)
    q, scales, mins = four(s, 7, 128, 32, False)
    packed = q.view(7, 4, 16)[:, order].reshape(7, 64)
    agree(
        w4_linear(moved, packed, scales[:, order], mins[:, order]),
        w4_linear(x.double(), q, scales, mins),
    )
    q, scales = eight(s, 7, 128, 32)
    packed = q.view(7, 4, 32)[:, order].reshape(7, 128)
    agree(w8_linear(moved, packed, scales[:, order]), w8_linear(x.double(), q, scales))
    # And an order that the scales do not follow is another matrix.
    assert error(w8_linear(moved, packed, scales), w8_linear(x.double(), q, scales)).rms > 0.01


def test_rows_of_padding_change_nothing():
    s = source()
    x, weight = s.normal(5, 96), four(s, 7, 96, 32, False)
    padded = torch.cat((x, torch.full((12, 96), torch.nan)))
    agree(w4_linear(padded, *weight)[:5], w4_linear(x, *weight).double())
    q, scales = quantize_rowwise_int8(torch.cat((x, torch.zeros(12, 96))))
    alone = quantize_rowwise_int8(x)
    assert torch.equal(q[:5], alone[0]) and torch.equal(scales[:5], alone[1])
    assert not q[5:].any() and not scales[5:].any()


def test_int8_products_are_exact_at_their_largest():
    least = torch.full((1, 131071), -128, dtype=torch.int8)
    assert int8_matmul(least, least).item() == 131071 * 128 * 128 < 2**31
    mixed = least.clone()
    mixed[0, ::2] = 127
    assert int8_matmul(least, mixed).item() == -128 * (127 * 65536 - 128 * 65535)
    # Sums above 2 ** 24, which float32 would round.
    large = source().whole(100, 128, 6, 4096).to(torch.int8)
    sums = (large.long()[:, None] * large.long()).sum(-1)
    assert sums.min() > 2**24 and torch.equal(int8_matmul(large, large), sums.int())


def test_rows_are_quantised_to_the_nearest_step():
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5], [1e-45, 0, 0, 0, 0, 0], [0.0] * 6])
    q, scales = quantize_rowwise_int8(x)
    assert q[0].tolist() == [127, 0, 2, 2, 0, -2]
    assert scales.tolist()[0] == 1 and not q[2].any() and scales[2] == 0
    assert torch.isfinite(scales).all()
    x = source().normal(9, 70)
    q, scales = quantize_rowwise_int8(x)
    assert ((q * scales[:, None] - x).abs() <= scales[:, None] * 0.5001).all()
    assert (q.abs().amax(1) == 127).all()


def test_int8_and_per_channel_products_are_the_same():
    """x that is whole numbers with a largest of 127 is quantised without loss."""
    s = source()
    x = s.whole(-127, 128, 5, 64).float()
    x[:, 0] = 127
    q, scales = quantize_rowwise_int8(x)
    weight, weight_scales = eight(s, 7, 64, 64)
    y = int8_linear(q, scales, weight, weight_scales[:, 0])
    agree(y, w8_linear(x.double(), weight, weight_scales))


def test_float8_products_are_near_those_of_the_numbers_they_stand_for():
    s = source()
    x, w = s.normal(17, 128), s.normal(11, 128)

    def rounded(matrix):
        scales = matrix.abs().amax(1) / 448
        return (matrix / scales[:, None]).to(torch.float8_e4m3fn), scales

    (q, scales), (weight, weight_scales) = rounded(x), rounded(w)
    y = fp8_linear(q, scales, weight, weight_scales, torch.float32)
    wanted = x.double() @ w.double().T
    agree(y, wanted, torch.float8_e4m3fn)
    with pytest.raises(AssertionError):
        agree(y * 1.06, wanted, torch.float8_e4m3fn)


def test_a_pattern_that_keeps_everything_is_dense():
    s = source()
    x, weight = s.normal(5, 64), s.normal(7, 64)
    values, indices = nm_pack(weight, 4, 4)
    assert torch.equal(values, weight)
    assert torch.equal(nm_linear(x, values, indices, 4, 4), torch.nn.functional.linear(x, weight))


def test_the_largest_of_each_group_are_kept_and_of_equals_the_first():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 2.0, -2.0, 2.0, 0.0]])
    values, indices = nm_pack(weight, 2, 4)
    assert values.tolist() == [[-3.0, 2.0, 2.0, -2.0]] and indices.tolist() == [[1, 2, 0, 1]]
    s = source()
    x, weight = s.normal(5, 60), s.normal(7, 60)
    values, indices = nm_pack(weight, 3, 5)
    least = weight.view(7, 12, 5).abs().topk(2, largest=False).indices
    pruned = weight.view(7, 12, 5).scatter(-1, least, 0).view(7, 60)
    agree(nm_linear(x, values, indices, 3, 5), x.double() @ pruned.double().T)
