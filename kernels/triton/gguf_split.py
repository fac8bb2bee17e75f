"""The kernels of `dequantize_blocks`: GGUF's blocks, decoded as they are stored.

One kernel for each format; a program decodes a few blocks. Fields stand at any byte, so halves are
put together from two of them. Products and sums are rounded apart, which gives the bits of
reference/dequantize.py. Called by kernels/ops/gguf_split.py on a CUDA or ROCm device.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.formats import FORMATS
from kernels.triton.case import Case, Refused
from kernels.triton.configs import choose
from kernels.triton.launch import need_float, target_of
from kernels.triton.plan import Arguments, Plan, run, shipped
from kernels.triton.targets import Target

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@triton.jit
def _half(stored, at, ok):
    """float32 of the float16 at byte `at`."""
    low = tl.load(stored + at, mask=ok, other=0).to(tl.uint16)
    high = tl.load(stored + at + 1, mask=ok, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _blocks(blocks, BYTES: tl.constexpr, BB: tl.constexpr):
    """(block, first byte, whether it exists) int64 [BB, 1] of a program."""
    block = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)[:, None]
    return block, block * BYTES, block < blocks


@triton.jit(do_not_specialize=["blocks"])
def q4_0_kernel(stored, out, blocks, BB: tl.constexpr):
    """18 bytes: a scale, then 16 bytes whose halves stand 16 values apart."""
    block, at, ok = _blocks(blocks, 18, BB)
    byte = tl.arange(0, 16)[None, :]
    scale = _half(stored, at, ok)
    levels = tl.load(stored + at + 2 + byte, mask=ok, other=0)
    place = out + block * 32 + byte
    kept = out.dtype.element_ty
    tl.store(place, (((levels & 15).to(tl.float32) - 8) * scale).to(kept), mask=ok)
    tl.store(place + 16, (((levels >> 4).to(tl.float32) - 8) * scale).to(kept), mask=ok)


@triton.jit(do_not_specialize=["blocks"])
def q4_1_kernel(stored, out, blocks, BB: tl.constexpr):
    """20 bytes: a scale, a minimum, then 16 bytes whose halves stand 16 values apart."""
    block, at, ok = _blocks(blocks, 20, BB)
    byte = tl.arange(0, 16)[None, :]
    scale, least = _half(stored, at, ok), _half(stored, at + 2, ok)
    levels = tl.load(stored + at + 4 + byte, mask=ok, other=0)
    place = out + block * 32 + byte
    kept = out.dtype.element_ty
    tl.store(place, ((levels & 15).to(tl.float32) * scale + least).to(kept), mask=ok)
    tl.store(place + 16, ((levels >> 4).to(tl.float32) * scale + least).to(kept), mask=ok)


@triton.jit
def _fives(stored, nibbles, fifths, at, ok):
    """(first, second) int32 [BB, 16] of a block: values 0 to 15, and 16 to 31."""
    byte = tl.arange(0, 16)[None, :]
    levels = tl.load(stored + at + nibbles + byte, mask=ok, other=0).to(tl.int32)
    early = tl.load(stored + at + fifths + byte // 8, mask=ok, other=0).to(tl.int32)
    late = tl.load(stored + at + fifths + 2 + byte // 8, mask=ok, other=0).to(tl.int32)
    first = (levels & 15) | ((early >> (byte % 8) & 1) << 4)
    return first, (levels >> 4) | ((late >> (byte % 8) & 1) << 4)


@triton.jit(do_not_specialize=["blocks"])
def q5_0_kernel(stored, out, blocks, BB: tl.constexpr):
    """22 bytes: a scale, 4 bytes of fifth bits, then 16 bytes whose halves stand 16 apart."""
    block, at, ok = _blocks(blocks, 22, BB)
    scale = _half(stored, at, ok)
    first, second = _fives(stored, 6, 2, at, ok)
    place = out + block * 32 + tl.arange(0, 16)[None, :]
    kept = out.dtype.element_ty
    tl.store(place, ((first - 16).to(tl.float32) * scale).to(kept), mask=ok)
    tl.store(place + 16, ((second - 16).to(tl.float32) * scale).to(kept), mask=ok)


@triton.jit(do_not_specialize=["blocks"])
def q5_1_kernel(stored, out, blocks, BB: tl.constexpr):
    """24 bytes: a scale, a minimum, 4 bytes of fifth bits, then 16 bytes."""
    block, at, ok = _blocks(blocks, 24, BB)
    scale, least = _half(stored, at, ok), _half(stored, at + 2, ok)
    first, second = _fives(stored, 8, 4, at, ok)
    place = out + block * 32 + tl.arange(0, 16)[None, :]
    kept = out.dtype.element_ty
    tl.store(place, (first.to(tl.float32) * scale + least).to(kept), mask=ok)
    tl.store(place + 16, (second.to(tl.float32) * scale + least).to(kept), mask=ok)


@triton.jit(do_not_specialize=["blocks"])
def q8_0_kernel(stored, out, blocks, BB: tl.constexpr):
    """34 bytes: a scale, then 32 signed bytes."""
    block, at, ok = _blocks(blocks, 34, BB)
    value = tl.arange(0, 32)[None, :]
    levels = tl.load(stored + at + 2 + value, mask=ok, other=0).to(tl.int8, bitcast=True)
    scaled = levels.to(tl.float32) * _half(stored, at, ok)
    tl.store(out + block * 32 + value, scaled.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["blocks"])
def q4_k_kernel(stored, out, blocks, BB: tl.constexpr):
    """144 bytes: a scale and a scale of minima, 8 pairs of 6 bits in 12 bytes, and 4 runs of 32
    bytes whose halves stand 32 values apart."""
    block, at, ok = _blocks(blocks, 144, BB)
    _nested(stored, out, block, at, ok, False)


@triton.jit(do_not_specialize=["blocks"])
def q5_k_kernel(stored, out, blocks, BB: tl.constexpr):
    """176 bytes: as q4_k, with 32 bytes of fifth bits before the runs, bit g those of group g."""
    block, at, ok = _blocks(blocks, 176, BB)
    _nested(stored, out, block, at, ok, True)


@triton.jit
def _nested(stored, out, block, at, ok, FIVE: tl.constexpr):
    """Blocks of q4_k or q5_k."""
    group = tl.arange(0, 8)[None, :]
    near, late = at + 4 + group % 4, group >= 4
    first = tl.load(stored + near, mask=ok, other=0).to(tl.int32)
    second = tl.load(stored + near + 4, mask=ok, other=0).to(tl.int32)
    high = tl.load(stored + near + 8, mask=ok, other=0).to(tl.int32)
    scale = tl.where(late, (high & 15) | ((first >> 2) & 48), first & 63).to(tl.float32)
    least = tl.where(late, (high >> 4) | ((second >> 2) & 48), second & 63).to(tl.float32)
    scale = (scale * _half(stored, at, ok))[:, :, None]
    least = (least * _half(stored, at + 2, ok))[:, :, None]
    group = tl.arange(0, 8)[None, :, None]
    value = tl.arange(0, 32)[None, None, :]
    ok = ok[:, :, None]
    runs = at[:, :, None] + (48 if FIVE else 16)
    levels = tl.load(stored + runs + group // 2 * 32 + value, mask=ok, other=0)
    levels = tl.where(group % 2 == 0, levels & 15, levels >> 4).to(tl.int32)
    if FIVE:
        fifths = tl.load(stored + at[:, :, None] + 16 + value, mask=ok, other=0).to(tl.int32)
        levels |= ((fifths >> group) & 1) << 4
    levels = levels.to(tl.float32)
    place = out + block[:, :, None] * 256 + group * 32 + value
    tl.store(place, (levels * scale - least).to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["blocks"])
def q6_k_kernel(stored, out, blocks, BB: tl.constexpr):
    """210 bytes: 128 of four low bits, 64 of two high bits, 16 signed scales, and their scale.
    In each half of a block a byte of low bits serves values 64 apart, of high bits 32 apart."""
    block, at, ok = _blocks(blocks, 210, BB)
    group = tl.arange(0, 16)[None, :]
    scale = tl.load(stored + at + 192 + group, mask=ok, other=0).to(tl.int8, bitcast=True)
    scale = (_half(stored, at + 208, ok) * scale.to(tl.float32))[:, :, None]
    at, ok = at[:, :, None], ok[:, :, None]
    value = tl.arange(0, 16)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    half, within = value // 128, value % 128
    low = tl.load(stored + at + half * 64 + within % 64, mask=ok, other=0)
    low = tl.where(within < 64, low & 15, low >> 4).to(tl.int32)
    high = tl.load(stored + at + 128 + half * 32 + within % 32, mask=ok, other=0).to(tl.int32)
    levels = low | (((high >> (within // 32 * 2)) & 3) << 4)
    scaled = (levels - 32).to(tl.float32) * scale
    tl.store(out + block[:, :, None] * 256 + value, scaled.to(out.dtype.element_ty), mask=ok)


def _kernel(form: str) -> Any:
    kernels = {
        "Q4_0": q4_0_kernel,
        "Q4_1": q4_1_kernel,
        "Q5_0": q5_0_kernel,
        "Q5_1": q5_1_kernel,
        "Q8_0": q8_0_kernel,
        "Q4_K": q4_k_kernel,
        "Q5_K": q5_k_kernel,
        "Q6_K": q6_k_kernel,
    }
    return kernels[form]


def dequantize_blocks(stored: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    """As reference/gguf_split.py, in float32, rounded once."""
    target = target_of("dequantize_blocks", stored)
    block = FORMATS[form]
    count = stored.shape[0] // block.block_bytes
    out = torch.empty(count * block.block_values, dtype=dtype, device=stored.device)
    need_float("dequantize_blocks", out)
    if form in PLAIN:
        return out.copy_(stored.clone().view(PLAIN[form]))
    run(plan(target, stored.contiguous(), form, out))
    return out


def plan(target: Target, stored: torch.Tensor, form: str, out: torch.Tensor) -> Plan:
    blocks = out.shape[0] // FORMATS[form].block_values
    config = choose("dequantize_blocks", target, blocks)
    each = config.constants["VALUES"] // FORMATS[form].block_values
    args: Arguments = dict(stored=stored, out=out, blocks=blocks, BB=each)
    return Plan(_kernel(form), (triton.cdiv(blocks, each),), args, config, fp_fusion=False)


def cases(target: Target) -> list[Case | Refused]:
    """Every format that has a kernel."""
    made: list[Case | Refused] = []
    for form in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"):
        count = 1 << 24
        block = FORMATS[form]
        size = count // block.block_values * block.block_bytes
        stored = torch.empty(size, dtype=torch.uint8, device="meta")
        out = torch.empty(count, dtype=torch.bfloat16, device="meta")
        name = f"dequantize_blocks/{form.lower()}-bf16"
        made.append(shipped(name, plan(target, stored, form, out), 2 * count))
    return made
