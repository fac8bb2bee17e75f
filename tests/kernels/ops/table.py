"""The cases themselves, one line each. test_conformance.py holds that no op is without one."""

from functools import partial

import torch

from kernels import ops
from tests.kernels.ops import cases, integer_cases, oracles
from tests.kernels.ops.cases import EXACT, Case
from tests.kernels.ops.measure import FP8_ON_A_GPU

W4 = ops.linear_w4.w4_linear
W8 = ops.linear_w8.w8_linear
PREFILL = ops.attention_prefill.prefill_attention
PAGED = ops.attention_paged.paged_attention
SPARSE = ops.attention_sparse.block_sparse_attention
SCAN = ops.scan.selective_scan


def w4(group: int, symmetric: bool, bias: bool) -> Case:
    name = f"w4_linear/{group}-{'symmetric' if symmetric else 'mins'}"
    make = partial(cases.w4_case, group=group, symmetric=symmetric, bias=bias)
    return Case(name, W4, make, oracles.w4_linear, differentiable=(0, 4) if bias else (0,))


def w8(group: int, k: int, bias: bool) -> Case:
    make = partial(cases.w8_case, group=group, k=k, bias=bias)
    places = (0, 3) if bias else (0,)
    return Case(f"w8_linear/{group}", W8, make, oracles.w8_linear, differentiable=places)


def prefill(name: str, *settings) -> Case:
    def make(source, rows):
        return cases.prefill_case(source, rows, *settings)

    return Case(f"prefill_attention/{name}", PREFILL, make, oracles.prefill)


def paged(kind: str, window: int, splits: int) -> Case:
    make = partial(cases.paged_case, kind=kind, window=window, splits=splits)
    return Case(f"paged_attention/{kind}-{window}-{splits}", PAGED, make, oracles.paged)


CASES = (
    w4(32, True, False),
    w4(32, False, True),
    w4(64, False, False),
    w4(128, True, True),
    Case(
        "dequantize_w4",
        ops.linear_w4.dequantize_w4,
        lambda s, rows: (*cases.four(s, rows, 64, 32, False), s.dtype),
        oracles.w4,
    ),
    w8(16, 48, True),
    w8(32, 96, False),
    w8(128, 128, True),
    w8(70, 70, False),
    Case(
        "dequantize_w8",
        ops.linear_w8.dequantize_w8,
        lambda s, rows: (*cases.eight(s, rows, 48, 16), s.dtype),
        oracles.w8,
    ),
    *(
        Case(
            f"dequantize_blocks/{form}",
            ops.gguf_split.dequantize_blocks,
            partial(cases.blocks_case, form=form),
            oracles.blocks,
        )
        for form in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
    ),
    Case(
        "quantize_rowwise_int8",
        ops.linear_int8.quantize_rowwise_int8,
        lambda s, rows: (s.normal(rows, 33) * torch.arange(rows)[:, None].to(s.dtype),),
        oracles.quantize_rows,
    ),
    Case(
        "int8_matmul",
        ops.linear_int8.int8_matmul,
        lambda s, rows: (cases.signed(s, rows, 70), cases.signed(s, 13, 70)),
        oracles.int8_matmul,
        EXACT,
    ),
    Case("int8_linear", ops.linear_int8.int8_linear, cases.int8_case, oracles.int8_linear),
    Case(
        "fp8_linear",
        ops.linear_fp8.fp8_linear,
        cases.fp8_case,
        oracles.fp8_linear,
        on_gpu=FP8_ON_A_GPU,
    ),
    Case(
        "rms_norm",
        ops.norm.rms_norm,
        lambda s, rows: (s.normal(rows, 33), s.normal(33), 1e-5),
        oracles.rms_norm,
        differentiable=(0, 1),
    ),
    Case(
        "rms_norm_residual",
        ops.norm.rms_norm_residual,
        lambda s, rows: (s.normal(rows, 33), s.normal(rows, 33), s.normal(33), 1e-5),
        oracles.rms_norm_residual,
        differentiable=(0, 1, 2),
    ),
    Case("rope", ops.rope.rope, cases.rope_case, oracles.rope, differentiable=(0, 1)),
    *(
        Case(
            f"gated/{kind}",
            ops.gated.gated,
            partial(cases.gated_case, activation=kind),
            oracles.gated,
            differentiable=(0,),
        )
        for kind in ("silu", "gelu_tanh")
    ),
    *(
        Case(
            f"kv_write/{kind}",
            ops.kv_cache.kv_write,
            partial(cases.write_case, kind=kind),
            oracles.kv_write,
            run=cases.written,
        )
        for kind in ("float", "int8", "int4")
    ),
    prefill("causal"),
    prefill("all", False),
    prefill("window", True, 3),
    prefill("sinks", True, 2, 2, 0.3),
    prefill("window-all", False, 3, 1),
    paged("float", 0, 1),
    paged("float", 5, 3),
    paged("int8", 0, 2),
    paged("int8", 9, 1),
    paged("int4", 0, 1),
    paged("int4", 8, 2),
    Case("merge_states", ops.attention_paged.merge_states, cases.merge_case, oracles.merge),
    *(
        Case(
            f"block_sparse_attention/{'causal' if causal else 'all'}",
            SPARSE,
            partial(cases.sparse_case, causal=causal),
            oracles.block_sparse,
        )
        for causal in (True, False)
    ),
    Case(
        "moe_align",
        ops.moe.moe_align,
        lambda s, rows: (cases.experts(s, rows, 2), 5, 4),
        oracles.moe_align,
        EXACT,
    ),
    Case(
        "grouped_linear",
        ops.moe.grouped_linear,
        cases.grouped_case,
        oracles.grouped_linear,
        differentiable=(0, 1),
    ),
    Case("grouped_outer", ops.moe.grouped_outer, cases.outer_case, oracles.grouped_outer),
    *(
        Case(
            f"nm_linear/{n}-{m}",
            ops.linear_nm.nm_linear,
            partial(cases.nm_case, n=n, m=m),
            oracles.nm_linear,
        )
        for n, m in ((2, 4), (1, 4), (4, 8), (3, 5))
    ),
    Case(
        "sgmv",
        ops.lora_batched.sgmv,
        cases.sgmv_case,
        oracles.sgmv,
        differentiable=(0, 1, 2),
    ),
    *(
        Case(
            f"selective_scan/{'state' if state else 'fresh'}",
            SCAN,
            partial(cases.scan_case, state=state),
            oracles.selective_scan,
            differentiable=(0, 1, 2, 3, 4, 5, 6) if state else (0, 1, 2, 3, 4, 5),
        )
        for state in (False, True)
    ),
    Case("sample", ops.sampling.sample, cases.sample_case, oracles.sample),
    *integer_cases.CASES,
)
