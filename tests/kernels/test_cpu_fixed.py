"""Products in 16-bit fixed point on AMX (batch_invariant = False): against float64 on the decoded
weights, against the same arithmetic in NumPy's int64, and against themselves in other company."""

import gguf
import numpy as np
import pytest
import torch

from kernels.cpu import ops
from kernels.formats import FORMATS
from tests.kernels.blocks import flat, random_blocks

ROWS = 40  # two whole tiles and a half
FORMS = tuple(ops.KINDS)
COUNTS = [1, 2, 3, 6, 8, 9, 15, 16, 17, 31, 33, 64, 100, 512]
BOUND = 1e-3
ACTIVATIONS: tuple[ops.Activations, ...] = ("accurate", "fast")
LARGEST = np.float32(30000)

needs_amx = pytest.mark.skipif(not ops.has_matrix_units(), reason="this machine has no AMX")


def packed(form: str, columns: int) -> tuple[ops.Packed, torch.Tensor, np.ndarray]:
    """A packed matrix, what the gguf library decodes it to, and its blocks."""
    blocks = random_blocks(form, ROWS, columns, 0)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[form])
    made = ops.pack(flat(blocks), form, ROWS, columns)
    return made, torch.from_numpy(values.copy()), blocks


def randomly(m: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, columns, generator=torch.Generator().manual_seed(seed))


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the results' root mean square."""
    return float((y - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())


@needs_amx
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", COUNTS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_products_are_those_of_the_decoded_weights(form: str, m: int, activations):
    # An odd number of groups where the format has such, so that the last step is half empty.
    weight, decoded, _ = packed(form, max(96, 3 * FORMATS[form].block_values))
    x = randomly(m, weight.columns)
    y = ops.linear(x, weight, activations=activations, batch_invariant=False)
    wanted = x.double() @ decoded.double().T
    few = m < ops.FEWEST_FIXED_ROWS[activations]
    assert error(y, wanted) < (2e-2 if few else BOUND)
    exact = ops.linear(x, weight, activations=activations)
    assert torch.equal(y, exact) == few  # which are left to the lanes


def fixed_weights(form: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """16-bit numbers [rows, columns] of Q4_1 or Q8_0 blocks, and each row's scale."""
    size = FORMATS[form].block_bytes
    grouped = blocks.reshape(ROWS, -1, size)
    scale = grouped[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    if form == "Q8_0":
        whole = grouped[..., 2:].view(np.int8).astype(np.int64)
        most = np.abs(scale).max(1, keepdims=True) * np.float32(128)
        step = np.rint(scale * (LARGEST / most) * np.float32(128)).astype(np.int64)
        numbers = (whole * 256 * step[..., None] + (1 << 14)) >> 15
        return numbers.reshape(ROWS, -1), most * (np.float32(1) / LARGEST)
    low = grouped[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32)
    nibbles = np.concatenate([grouped[..., 4:] & 15, grouped[..., 4:] >> 4], -1).astype(np.int64)
    high = low + np.float32(15) * scale
    most = np.maximum(np.abs(low), np.abs(high)).max(1, keepdims=True)
    inverse = LARGEST / most
    down = scale < 0  # counted from the other end
    nibbles = np.where(down[..., None], 15 - nibbles, nibbles)
    sixteenths = np.rint(np.abs(scale) * inverse * np.float32(16)).astype(np.int64)
    base = np.rint(np.where(down, high, low) * inverse + np.float32(15 / 32)).astype(np.int64)
    numbers = (nibbles * sixteenths[..., None] >> 4) + base[..., None]
    return numbers.reshape(ROWS, -1), most * (np.float32(1) / LARGEST)


def fixed_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """16-bit numbers of activations [m, columns], and each row's scale."""
    most = np.abs(x).max(1, keepdims=True)
    return np.rint(x * (LARGEST / most)).astype(np.int64), most / LARGEST


@needs_amx
@pytest.mark.parametrize("form", ["Q4_1", "Q8_0"])
def test_the_integers_are_exact(form: str):
    """In int64 the same numbers have the same products, which float32 holds to 24 bits: a hundred
    times as near as the rounding to 16 bits is. That of the low bytes, those of the weights 128 at
    the mean, is left out; without either side's low bytes the bound would be missed."""
    weight, decoded, blocks = packed(form, 544)
    x = randomly(40, 544)
    weights, of_weights = fixed_weights(form, blocks)
    rows, of_rows = fixed_rows(x.numpy())
    scale = torch.from_numpy(of_rows.astype(np.float64) * of_weights.astype(np.float64).T)
    low_rows, low_weights = (rows + 128) % 256 - 128, weights % 256
    wanted = torch.from_numpy(rows @ weights.T - low_rows @ (low_weights - 128).T) * scale
    for m in (8, 16, 17, 40):
        for activations in ACTIVATIONS:
            if m >= ops.FEWEST_FIXED_ROWS[activations]:
                y = ops.linear(x[:m], weight, activations=activations, batch_invariant=False)
                assert error(y, wanted[:m]) < 3e-7
    exact = x.double() @ decoded.double().T
    for mutated in ((rows - low_rows) @ weights.T, rows @ (weights - low_weights).T):
        assert error(torch.from_numpy(mutated) * scale, exact) > BOUND


@needs_amx
def test_columns_in_pieces_are_exact():
    """More columns than two tiles have room for in the nearest cache: sums wait in memory."""
    blocks = random_blocks("Q8_0", ROWS, 1568, 2)
    weight = ops.pack(flat(blocks), "Q8_0", ROWS, 1568)
    weights, of_weights = fixed_weights("Q8_0", blocks)
    x = randomly(70, 1568)
    rows, of_rows = fixed_rows(x.numpy())
    low_rows, low_weights = (rows + 128) % 256 - 128, weights % 256
    wanted = torch.from_numpy(rows @ weights.T - low_rows @ (low_weights - 128).T)
    wanted = wanted * torch.from_numpy(of_rows.astype(np.float64) * of_weights.astype(np.float64).T)
    assert error(ops.linear(x, weight, batch_invariant=False), wanted) < 3e-7


@needs_amx
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_threads_change_no_bit_nor_does_company_beyond_a_few(form: str, activations):
    weight, _, _ = packed(form, 768)
    x = randomly(41, 768)
    first = ops.linear(x, weight, activations=activations, batch_invariant=False)
    for threads in (2, 3):
        y = ops.linear(x, weight, activations=activations, threads=threads, batch_invariant=False)
        assert torch.equal(y, first)
    for begin, end in ((0, 10), (3, 17), (8, 24), (20, 41), (7, 41)):
        y = ops.linear(x[begin:end], weight, activations=activations, batch_invariant=False)
        assert torch.equal(y, first[begin:end])


@pytest.mark.parametrize("isa", [isa for isa in ops.instruction_sets() if isa != "amx"])
@pytest.mark.parametrize("activations", ["accurate", "fast", "float32"])
def test_elsewhere_nothing_changes(isa: str, activations):
    weight, _, _ = packed("Q4_1", 96)
    x = randomly(17, 96)
    y = ops.linear(x, weight, activations=activations, isa=isa, batch_invariant=False)
    assert torch.equal(y, ops.linear(x, weight, activations=activations, isa=isa))


@needs_amx
def test_unrounded_activations_stay_so():
    weight, _, _ = packed("Q4_1", 96)
    x = randomly(17, 96)
    y = ops.linear(x, weight, activations="float32", batch_invariant=False)
    assert torch.equal(y, ops.linear(x, weight, activations="float32"))


@needs_amx
def test_extreme_activations():
    weight, decoded, _ = packed("Q4_1", 96)
    x = torch.zeros(6, 96)
    x[1, 7] = 1e-30
    x[2] = 1e30
    y = ops.linear(x, weight, batch_invariant=False)
    assert not y[0].any()
    most = decoded.abs().max(1).values
    assert ((y[1] / 1e-30 - decoded[:, 7]).abs() <= most / 15000).all()
    assert torch.isfinite(y[2]).all()


@needs_amx
@pytest.mark.parametrize("form", FORMS)
def test_weights_of_any_sign_and_zero(form: str):
    """A row of zeros, and scales of both signs, give what they should."""
    blocks = random_blocks(form, 16, 768, 3)
    blocks[0] = 0
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[form])
    weight = ops.pack(flat(blocks), form, 16, 768)
    decoded = torch.from_numpy(values.copy())
    x = randomly(6, 768)
    y = ops.linear(x, weight, batch_invariant=False)
    assert not y[:, 0].any()
    assert error(y, x.double() @ decoded.double().T) < BOUND
