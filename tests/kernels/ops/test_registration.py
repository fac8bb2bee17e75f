"""What torch is told of the ops: schemas, shapes without values, gradients, and what is refused."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from kernels import ops
from kernels.ops.define import Out, on_cuda
from kernels.reference.moe import grouped_outer
from tests.kernels.ops import integer_cases
from tests.kernels.ops.cases import Case, Source
from tests.kernels.ops.table import CASES

ROOT = Path(__file__).parents[3]
WITH_GRADIENTS = [case for case in CASES if case.differentiable]


def checks(case: Case) -> tuple[str, ...]:
    """All of opcheck's, but that torch cannot compare float8 numbers, as its schema check would."""
    every = ("schema", "autograd_registration", "faketensor", "aot_dispatch_dynamic")
    chosen = every[1:] if case.op_name == "fp8_linear" else every
    return tuple(f"test_{check}" for check in chosen)


def inputs(case: Case, rows: int, dtype: torch.dtype) -> list[Any]:
    """A case's arguments, those with a gradient asking for it."""
    args = list(case.make(Source(rows, dtype), rows))
    for place in case.differentiable:
        args[place] = args[place].to(dtype).requires_grad_()
    return args


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_finds_nothing_wrong(case: Case):
    """Schema, autograd, fake tensors and ahead-of-time tracing, with shapes that may change."""
    op = cast(torch._library.custom_ops.CustomOpDef, case.op)
    torch.library.opcheck(op, tuple(inputs(case, 5, case.dtypes[0])), test_utils=checks(case))


def test_the_backward_scan_is_an_op_too():
    torch.library.opcheck(
        torch.ops.sanderling.selective_scan_backward, scan_backward(torch.float32)
    )


def scan_backward(dtype: torch.dtype) -> tuple[Any, ...]:
    case = next(case for case in CASES if case.name == "selective_scan/state")
    args = case.make(Source(0, dtype), 3)
    y, last = case.op(*args)
    return torch.randn_like(y), torch.randn_like(last), *args


@pytest.mark.parametrize("case", WITH_GRADIENTS, ids=lambda case: case.name)
def test_gradients_are_those_of_small_differences(case: Case):
    args = inputs(case, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *given: case.op(*given), args)


@pytest.mark.parametrize("case", WITH_GRADIENTS, ids=lambda case: case.name)
def test_gradients_of_halves_are_near_those_of_doubles(case: Case):
    """In bfloat16 every gradient has the dtype of its input, and the value within rounding."""
    halves = inputs(case, 5, torch.bfloat16)
    doubles = [
        each.detach().double().requires_grad_() if at in case.differentiable else each
        for at, each in enumerate(halves)
    ]
    for place in (2, 6) if case.op_name == "selective_scan" else ():
        if place < len(halves) and halves[place] is not None:
            halves[place] = halves[place].detach().float().requires_grad_()
    for rough, exact in zip(gradients(case, halves), gradients(case, doubles), strict=True):
        assert torch.isfinite(rough).all()
        off = (rough.double() - exact).square().mean().sqrt()
        assert off <= 1e-2 * exact.square().mean().sqrt()


def gradients(case: Case, args: list[Any]) -> tuple[torch.Tensor, ...]:
    out = case.op(*args)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    chance = torch.Generator().manual_seed(0)
    seeds = [torch.randn(o.shape, generator=chance).to(o.dtype) for o in outs]
    wanted = [args[place] for place in case.differentiable]
    grads = torch.autograd.grad(outs, wanted, seeds)
    assert [grad.dtype for grad in grads] == [each.dtype for each in wanted]
    return grads


def test_a_wrong_gradient_is_seen(monkeypatch):
    case = next(case for case in CASES if case.name == "rope")
    monkeypatch.setattr(case.op, "_backward_fn", lambda ctx, q, k: (q, k, None, None))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *given: case.op(*given), inputs(case, 3, torch.float64))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shapes_are_known_without_values(case: Case):
    """On the meta device nothing is computed, and the answers have shape, dtype and strides."""
    args = case.make(Source(1, case.dtypes[0]), 5)
    made = case.op(*[arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args])
    real = case.op(*args)
    one = isinstance(real, torch.Tensor)
    for meta, value in [(made, real)] if one else zip(made or (), real or (), strict=True):
        assert meta.is_meta and (meta.shape, meta.dtype) == (value.shape, value.dtype)
        assert meta.stride() == value.stride()


X, Q = torch.zeros(3, 64), torch.zeros(5, 32, dtype=torch.uint8)
S, IDS = torch.zeros(5, 2), torch.zeros(3, dtype=torch.int32)
HEADS, KEYS = torch.zeros(3, 4, 32), torch.zeros(3, 3, 32)
PAGES, TABLE = torch.zeros(2, 8, 2, 32), torch.zeros(3, 1, dtype=torch.int32)
REFUSED = {
    r"w4_linear: x should be \[3, 64\], not \[3, 32\]": lambda: ops.linear_w4.w4_linear(
        X[:, :32], Q, S, None
    ),
    "group of 32, 64 or 128": lambda: ops.linear_w4.w4_linear(X, Q, S.repeat(1, 2), None),
    r"mins should be \[5, 2\]": lambda: ops.linear_w4.dequantize_w4(Q, S, S[:4], torch.float32),
    "asked to return torch.int8": lambda: ops.linear_w4.dequantize_w4(Q, S, S, torch.int8),
    "qweight is torch.uint8; accepted are torch.int8": lambda: ops.linear_w8.w8_linear(X, Q, S),
    "'Q5_9' is not known; accepted are F32": lambda: ops.gguf_split.dequantize_blocks(
        torch.zeros(18, dtype=torch.uint8), "Q5_9", torch.float32
    ),
    "Q4_0 are a multiple of 18 bytes": lambda: ops.gguf_split.dequantize_blocks(
        torch.zeros(19, dtype=torch.uint8), "Q4_0", torch.float32
    ),
    "131071 columns, not 131072": lambda: ops.linear_int8.int8_matmul(
        *[torch.zeros(1, 131072, dtype=torch.int8)] * 2
    ),
    "x is torch.float32; accepted are torch.float8_e4m3fn": lambda: ops.linear_fp8.fp8_linear(
        X, X[:, 0], X, X[:, 0], torch.float32
    ),
    r"weight should be \[64\], not \[63\]": lambda: ops.norm.rms_norm(X, X[0, :63], 1e-5),
    "residual is torch.float16": lambda: ops.norm.rms_norm_residual(X, X.half(), X[0], 1e-5),
    "an even size, not 31": lambda: ops.rope.rope(
        HEADS[..., :31], HEADS[..., :31], X[:, :15], X[:, :15]
    ),
    "'relu' is not known; accepted are silu, gelu_tanh": lambda: ops.gated.gated(X, "relu"),
    "key_cache of torch.int8 needs its scales": lambda: ops.kv_cache.kv_write(
        HEADS, HEADS, IDS.long(), PAGES.to(torch.int8), PAGES.to(torch.int8), None, None
    ),
    "has no scales; pass None": lambda: ops.kv_cache.kv_write(
        HEADS, HEADS, IDS.long(), PAGES, PAGES, S, S
    ),
    "slots is torch.int32": lambda: ops.kv_cache.kv_write(
        HEADS[:, :2], HEADS[:, :2], IDS, PAGES, PAGES, None, None
    ),
    "4 query heads should be a multiple of 3": lambda: ops.attention_prefill.prefill_attention(
        HEADS, KEYS, KEYS, IDS
    ),
    r"window \(-1\)": lambda: ops.attention_prefill.prefill_attention(
        HEADS, HEADS, HEADS, IDS, True, -1
    ),
    r"splits \(0\)": lambda: ops.attention_paged.paged_attention(
        HEADS, PAGES, PAGES, None, None, TABLE, IDS, 0, 0
    ),
    "one part at least": lambda: ops.attention_paged.merge_states(
        torch.zeros(0, 3, 4, 32), torch.zeros(0, 3, 4)
    ),
    r"block_mask should be \[4, 2, 2\]": lambda: ops.attention_sparse.block_sparse_attention(
        HEADS, HEADS, HEADS, torch.ones(4, 3, 3, dtype=torch.bool), 2
    ),
    r"experts \(0\)": lambda: ops.moe.moe_align(TABLE, 0, 4),
    r"expert_ids should be \[3\]": lambda: ops.moe.grouped_linear(X, X[None], IDS[:2]),
    "3:2 is no pattern": lambda: ops.linear_nm.nm_linear(X, X, X.to(torch.uint8), 3, 2),
    r"sgmv: b should be \[1, 5, 3\]": lambda: ops.lora_batched.sgmv(
        X, X[None], torch.zeros(1, 5, 4), IDS.long(), X[0, :1]
    ),
    r"state should be \[1, 64, 2\]": lambda: ops.scan.selective_scan(
        X[None], X[None], torch.zeros(64, 2), X[None, :, :2], X[None, :, :2], X[0], HEADS
    ),
    r"top_p should be \[3\]": lambda: ops.sampling.sample(X, X[:, 0], IDS, X[0], X[:, 0]),
    "on one device, not on cpu, meta": lambda: ops.norm.rms_norm(X, X[0].to("meta"), 1e-5),
    **integer_cases.REFUSED,
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_wrong_arguments_are_named(sentence: str):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()


def describe(left, right, expert_ids, experts):
    return Out((experts, left.shape[1], right.shape[1]), right.dtype)


OUTER = torch.ones(2, 3), torch.ones(2, 4), torch.tensor([0, 1]), 2


def test_a_cuda_device_without_driver_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = on_cuda("grouped_outer", grouped_outer, describe, "moe")
    with pytest.raises(RuntimeError, match="grouped_outer on a CUDA device needs a driver"):
        run(*OUTER)
    # Plain torch needs no kernel of ours, only a device.
    assert torch.equal(
        on_cuda("grouped_outer", grouped_outer, describe, None)(*OUTER)[0],
        *[grouped_outer(*OUTER)[0]],
    )


def test_a_missing_module_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = on_cuda("grouped_outer", grouped_outer, describe, "nowhere")
    with pytest.raises(RuntimeError, match="grouped_outer .* needs the module kernels.triton"):
        run(*OUTER)


def test_the_launcher_is_handed_the_arguments(monkeypatch):
    """A module in the place of kernels.triton's; only its function is called."""
    seen = []
    module = ModuleType("kernels.triton.stand_in")
    module.grouped_outer = lambda *args: seen.append(args) or torch.ones(4, 3).T  # type: ignore
    monkeypatch.setitem(sys.modules, "kernels.triton", ModuleType("kernels.triton"))
    monkeypatch.setitem(sys.modules, "kernels.triton.stand_in", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = on_cuda("grouped_outer", grouped_outer, describe, "stand_in")(*OUTER)
    assert made.is_contiguous() and len(seen) == 1
    assert all(mine is given for mine, given in zip(seen[0], OUTER, strict=True))


def test_triton_is_not_imported_with_the_ops():
    code = (
        "import sys\nsys.modules['triton'] = None\nimport torch, kernels.ops\n"
        "from kernels.ops.norm import rms_norm\nrms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)\n"
        "assert not any(name.startswith('kernels.triton') for name in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
