"""Every op against its oracle, for every dtype and for 0, 1 and 17 rows; and that each would be
caught if it went wrong a little. On a GPU too, where there is one."""

import importlib
import inspect
from typing import Any

import pytest
import torch

from kernels import ops
from tests.kernels.ops import integer_cases
from tests.kernels.ops.cases import ROWS, Case, Source, check
from tests.kernels.ops.measure import agree
from tests.kernels.ops.table import CASES

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
# Its values are those of the gradient check, which is stricter.
WITHOUT_CASE = {"selective_scan_backward"}
# Backward passes in plain torch, on every device.
WITHOUT_KERNEL = {"selective_scan_backward", "grouped_outer"}


def registered() -> dict[str, Any]:
    """Every op of kernels.ops by its plain name."""
    return {
        name: value
        for module in ops.MODULES
        for name, value in vars(module).items()
        if isinstance(value, torch._library.custom_ops.CustomOpDef)
    }


def test_every_op_has_a_case():
    assert set(registered()) - WITHOUT_CASE == {case.op_name for case in CASES}
    assert len(CASES) == len({case.name for case in CASES})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_what_the_oracle_says(case: Case, device: str):
    for dtype in case.dtypes:
        for rows in ROWS:
            check(case, rows, dtype, device=device)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_views_are_read_through_their_strides(case: Case):
    """Every tensor with gaps between its rows and an offset before them, and with NaN in both."""
    args = case.make(Source(5, case.dtypes[0]), 5)
    wanted = case.oracle(*args)
    run = case.run or (lambda op, *args: op(*args))
    got = run(case.op, *(spread(arg) for arg in args))
    pairs = [(got, wanted)] if isinstance(wanted, torch.Tensor) else zip(got, wanted, strict=True)
    for mine, right in pairs:
        agree(mine, right)


def spread(arg: Any) -> Any:
    if not isinstance(arg, torch.Tensor) or arg.dim() < 2:
        return arg
    filler = torch.nan if arg.dtype.is_floating_point and arg.element_size() > 1 else 1
    shape = [*arg.shape[:-1], arg.shape[-1] + 3]
    wide = torch.full(shape, 1, dtype=torch.float32).mul_(filler).to(arg.dtype)
    view = wide[..., 2 : 2 + arg.shape[-1]]
    view.copy_(arg)
    assert not view.is_contiguous() or view.numel() <= view.shape[-1]
    return view


# A small change to one argument: (place, change). An op that answers to it with the oracle's result
# for the unchanged arguments is one whose test sees nothing.
def scaled(by: float):
    return lambda tensor: (tensor.double() * by).to(tensor.dtype)


def swapped(packed: torch.Tensor) -> torch.Tensor:
    return (packed >> 4) | (packed << 4)


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(0)


CHANGES = {
    "w4_linear": (1, swapped),
    "dequantize_w4": (1, scaled(1.01)),
    "w8_linear": (2, scaled(1.01)),
    "dequantize_w8": (1, scaled(1.01)),
    "dequantize_blocks": (0, swapped),
    "quantize_rowwise_int8": (0, scaled(1.05)),
    "int8_matmul": (1, lambda b: b ^ 1),
    "int8_linear": (1, scaled(1.01)),
    "fp8_linear": (3, scaled(1.01)),
    "rms_norm": (2, lambda eps: eps + 0.1),
    "rms_norm_residual": (1, scaled(1.05)),
    "rope": (3, torch.neg),
    "gated": (0, lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1)),
    "kv_write": (2, flipped),
    "prefill_attention": (3, lambda starts: starts.clamp(max=15)),
    "paged_attention": (6, lambda contexts: (contexts - 1).clamp(min=0)),
    "merge_states": (1, scaled(1.1)),
    "block_sparse_attention": (3, lambda mask: mask.flip(1)),
    "moe_align": (0, flipped),
    "grouped_linear": (2, flipped),
    "grouped_outer": (2, flipped),
    "nm_linear": (2, lambda indices: indices ^ 1),
    "sgmv": (4, scaled(1.05)),
    "selective_scan": (2, scaled(1.05)),
    "sample": (4, lambda uniform: 1 - uniform),
    **integer_cases.CHANGES,
}


def test_every_op_has_a_change():
    assert set(CHANGES) == {case.op_name for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_seen(case: Case):
    place, change = CHANGES[case.op_name]

    def wrong(*args):
        changed = [change(arg) if at == place else arg for at, arg in enumerate(args)]
        if case.name == "nm_linear/3-5":
            changed[place] = changed[place].clamp(max=4)
        return case.op(*changed)

    # bfloat16, where most is allowed.
    check(case, 17, case.dtypes[-1])
    with pytest.raises(AssertionError):
        check(case, 17, case.dtypes[-1], op=wrong)


def test_names_and_defaults_are_the_same_everywhere():
    """What an op checks and what it runs take the same arguments, in the same order."""
    for name, op in registered().items():
        wanted = inspect.signature(op._init_fn).parameters
        described = inspect.signature(op._abstract_fn.__closure__[0].cell_contents)
        assert wanted == described.parameters, name


@pytest.mark.parametrize("name", sorted(set(registered()) - WITHOUT_KERNEL))
def test_launchers_take_the_arguments_of_the_op(name: str):
    pytest.importorskip("triton")
    reference = registered()[name]._init_fn
    module = reference.__module__.rsplit(".", 1)[-1]
    kernels = importlib.import_module(f"kernels.triton.{module}")
    launcher = inspect.signature(getattr(kernels, name)).parameters.values()
    wanted = inspect.signature(reference).parameters.values()
    assert [(p.name, p.default) for p in launcher] == [(p.name, p.default) for p in wanted]
