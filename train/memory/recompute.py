"""Activation checkpointing (Chen et al. 2016): what is not saved is computed again.

By layer ("all": only its input is kept) or by operation ("cheap": products of matrices and
attention are kept, all else is cheap to compute again; Korthikanti et al. 2022 call such a choice
selective). torch.utils.checkpoint does the work.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

COSTLY = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""Operations whose results "cheap" keeps."""


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    costly = operation in COSTLY
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS: dict[str, Callable[[], Any]] = {
    "all": noop_context_fn,
    "cheap": partial(create_selective_checkpoint_contexts, _policy),
}
"""What is computed again, by `memory.recompute`."""


def recomputed(forward: Callable[..., Tensor], what: str) -> Callable[..., Tensor]:
    """A layer's forward whose backward pass computes again what `what` names. The layer draws
    nothing at random, so the results are the same to the bit."""
    contexts = CONTEXTS[what]

    def run(*arguments: Tensor) -> Tensor:
        out: Tensor = checkpoint(
            forward,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )
        return out

    return run
