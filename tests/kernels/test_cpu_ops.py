"""The compiled CPU kernels against float64 on the decoded weights, and against themselves: on every
instruction set that this machine has, on any number of threads, in any company."""

import gguf
import numpy as np
import pytest
import torch

from kernels.cpu import ops
from kernels.formats import FORMATS
from kernels.reference.dequantize import dequantize
from kernels.reference.norm import rms_norm
from tests.kernels.blocks import flat, random_blocks

ROWS, COLUMNS = 40, 96  # 40 is not a whole number of tiles
FORMS = tuple(ops.KINDS)


def columns_of(form: str) -> int:
    """Some groups, or some blocks where those are larger."""
    return max(COLUMNS, 3 * FORMATS[form].block_values)


def packed(form: str, seed: int = 0) -> tuple[ops.Packed, torch.Tensor]:
    """A packed matrix, and what the gguf library decodes it to."""
    columns = columns_of(form)
    blocks = random_blocks(form, ROWS, columns, seed)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[form])
    return ops.pack(flat(blocks), form, ROWS, columns), torch.from_numpy(values.copy())


def randomly(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("isa", ["auto", *ops.instruction_sets()])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_decoded_ones_bit_for_bit(form: str, isa: str):
    weight, wanted = packed(form)
    ids = torch.tensor([39, 0, 16, 15, 31, 0])
    assert torch.equal(ops.rows(ids, weight, isa=isa), wanted[ids])
    with pytest.raises(IndexError, match="id 48 is not one of 48 rows"):
        ops.rows(torch.tensor([48]), weight, isa=isa)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 7, 17])
@pytest.mark.parametrize(
    "activations,bound", [("accurate", 2e-4), ("fast", 2e-2), ("float32", 1e-6)]
)
def test_products_are_those_of_the_decoded_weights(form: str, m: int, activations, bound: float):
    weight, decoded_weight = packed(form)
    x = randomly(m, weight.columns)
    y = ops.linear(x, weight, activations=activations)
    wanted = x.double() @ decoded_weight.double().T
    assert y.shape == (m, ROWS)
    if m:
        error = (y - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
        assert error < bound
        # The modes are not one and the same.
        other = "fast" if activations == "accurate" else "accurate"
        assert not torch.equal(y, ops.linear(x, weight, activations=other))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "activations,levels", [("accurate", 16256), ("fast", 127), ("float32", 1e6)]
)
def test_products_of_activations_that_need_no_rounding_are_exact(form, activations, levels):
    weight, decoded_weight = packed(form)
    chance = torch.Generator().manual_seed(2)
    x = torch.randint(-int(levels), int(levels) + 1, (5, weight.columns), generator=chance)
    x[:, ::32] = levels  # the largest of each group, so that a step is 1
    y = ops.linear(x.float(), weight, activations=activations)
    wanted = x.double() @ decoded_weight.double().T
    scale = x.double().abs() @ decoded_weight.double().abs().T
    assert ((y - wanted).abs() / scale).max() < 3e-7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activations", ["accurate", "fast", "float32"])
def test_instruction_sets_threads_and_company_change_no_bit(form: str, activations):
    weight, _ = packed(form)
    x = randomly(41, weight.columns)  # enough that matrix units are used, and a block not full
    first = ops.linear(x, weight, activations=activations)
    for isa in ops.instruction_sets():
        for threads in (1, 2, 3):
            y = ops.linear(x, weight, activations=activations, threads=threads, isa=isa)
            assert torch.equal(y, first), (isa, threads)
    for row in range(len(x)):
        alone = ops.linear(x[row : row + 1], weight, activations=activations)
        assert torch.equal(alone, first[row : row + 1])


def test_extreme_activations():
    weight, decoded_weight = packed("Q4_1")
    x = torch.zeros(3, COLUMNS)
    x[1, 7] = 1e-30
    x[2] = 1e30
    y = ops.linear(x, weight)
    assert not y[0].any()
    assert torch.allclose(y[1], x[1, 7] * decoded_weight[:, 7], rtol=1e-4, atol=0)
    assert torch.isfinite(y[2]).all()


@pytest.mark.parametrize("isa", ops.instruction_sets())
def test_norms(isa: str):
    x, weight = randomly(7, 96), randomly(96, seed=3)
    wanted = rms_norm(x.double(), weight.double(), 1e-5)
    y = ops.rms_norm(x, weight, 1e-5, isa=isa)
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(y, ops.rms_norm(x, weight, 1e-5, threads=2, isa="portable"))


def test_q4_0_scales_of_any_size_are_packed_without_loss():
    """-8 times a half is a half: for normal, subnormal and negative scales alike."""
    halves = np.array([1.0, -0.5, 6e-8, 5.9e-5, 1e-4, -6e-5, 0.0, 8000.0], dtype=np.float16)
    blocks = np.zeros((len(halves), 18), dtype=np.uint8)
    blocks[:, :2] = halves.view(np.uint8).reshape(-1, 2)
    blocks[:, 2:] = np.random.default_rng(0).integers(0, 256, (len(halves), 16))
    raw = torch.from_numpy(blocks).flatten()
    weight = ops.pack(raw, "Q4_0", len(halves), 32)
    wanted = dequantize(raw, "Q4_0", torch.empty(len(halves), 32))
    assert torch.equal(ops.rows(torch.arange(len(halves)), weight), wanted)
    too_large = torch.tensor([*np.float16(9000).tobytes(), *[0] * 16], dtype=torch.uint8)
    with pytest.raises(ValueError, match="too large to be packed without loss"):
        ops.pack(too_large, "Q4_0", 1, 32)


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_matrix_has_the_size_that_is_foretold(form: str):
    weight, _ = packed(form)
    assert weight.data.numel() == ops.packed_bytes(weight.kind, weight.rows, weight.columns)


@pytest.mark.parametrize("form", ["Q4_K", "Q5_K", "Q6_K"])
def test_scales_of_k_quants_take_all_their_bits(form: str):
    """Largest and smallest of them, in blocks of one value each."""
    blocks = random_blocks(form, 16, 256)
    inner = slice(192, 208) if form == "Q6_K" else slice(4, 16)
    blocks[0, inner], blocks[1, inner], blocks[2, inner] = 255, 0, 128
    weight = ops.pack(flat(blocks), form, 16, 256)
    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[form])
    assert torch.equal(ops.rows(torch.arange(16), weight), torch.from_numpy(wanted.copy()))


def test_refusals():
    weight, _ = packed("Q8_0")
    with pytest.raises(ValueError, match="BF16 is not packed for the CPU kernels; Q4_0, Q4_1, Q5"):
        ops.pack(torch.zeros(64, dtype=torch.uint8), "BF16", 1, 32)
    with pytest.raises(ValueError, match="columns should be a multiple of 256, not 128"):
        ops.pack(torch.zeros(105, dtype=torch.uint8), "Q6_K", 1, 128)
    with pytest.raises(ValueError, match="blocks should be 34 contiguous bytes"):
        ops.pack(torch.zeros(33, dtype=torch.uint8), "Q8_0", 1, 32)
    with pytest.raises(ValueError, match="'mmx' is not known; auto and"):
        ops.linear(randomly(1, COLUMNS), weight, isa="mmx")
    with pytest.raises(ValueError, match="'slow'; accurate, fast and float32 are accepted"):
        ops.linear(randomly(1, COLUMNS), weight, activations="slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x should be a contiguous float32"):
        ops.linear(randomly(1, COLUMNS).double(), weight)
    with pytest.raises(ValueError, match="threads is 0"):
        ops.linear(randomly(1, COLUMNS), weight, threads=0)
    with pytest.raises(ValueError, match="bytes, not"):
        ops.linear(randomly(1, 64), weight)


def test_opcheck():
    weight, _ = packed("Q4_1")
    native = ops._ops()
    x = randomly(3, COLUMNS)
    tests = ("test_schema", "test_faketensor")
    linear = (x, weight.data, 0, weight.padded_rows, "accurate", 1, "auto")
    torch.library.opcheck(native.packed_linear, linear, test_utils=tests)
    ids = (torch.tensor([1, 2]), weight.data, 0, weight.padded_rows, COLUMNS, 1, "auto")
    torch.library.opcheck(native.packed_rows, ids, test_utils=tests)
    torch.library.opcheck(native.rms_norm, (x, x[0], 1e-5, 1, "auto"), test_utils=tests)
