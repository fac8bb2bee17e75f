"""From a case of the ops' table to the launcher of its kernel."""

import importlib
from typing import Any, cast

import torch

from tests.kernels.ops.cases import Case


def module(case: Case) -> str:
    """The name of the module, the same in kernels/reference, kernels/ops and kernels/triton."""
    op = cast(torch._library.custom_ops.CustomOpDef, case.op)
    return op._init_fn.__module__.rsplit(".", 1)[-1]


def launcher(case: Case) -> Any:
    return getattr(importlib.import_module(f"kernels.triton.{module(case)}"), case.op_name)
