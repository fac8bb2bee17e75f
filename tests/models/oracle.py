"""transformers as the yardstick: the same checkpoint in fp32, teacher-forced.

`reference` loads it, `agreement` compares what we generated with what it would have. Used by the
tests here and by `make prove-serve`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Agreement(NamedTuple):
    """Over the generated tokens: how many there are, at how many the oracle's argmax is the same
    token, the smallest gap between the oracle's two best logits, and the largest absolute
    difference of any logit (0.0 when no logits were given)."""

    tokens: int
    agreeing: int
    smallest_margin: float
    max_logit_difference: float


def reference(path: Path) -> Any:
    """transformers' fp32 model of a .gguf file (decoded by transformers, about 30 s) or folder."""
    from transformers import AutoModelForCausalLM

    if path.is_dir():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, prompt: Sequence[int], generated: Sequence[int]) -> torch.Tensor:
    """[len(generated), vocab]: row i is what the oracle predicts where generated[i] was chosen."""
    ids = torch.tensor([[*prompt, *generated]])
    logits: torch.Tensor = model(ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : ids.shape[1] - 1]


def agreement(
    model: Any,
    prompt: Sequence[int],
    generated: Sequence[int],
    logits: torch.Tensor | None = None,
) -> Agreement:
    """How well `generated` (greedy, not empty) follows the oracle; logits [len(generated), vocab]
    are ours at the same positions."""
    wanted = reference_logits(model, prompt, generated)
    best = wanted.topk(2, dim=-1).values
    difference = 0.0 if logits is None else (wanted - logits).abs().max().item()
    same = wanted.argmax(dim=-1) == torch.tensor(list(generated))
    margin = (best[:, 0] - best[:, 1]).min().item()
    return Agreement(len(generated), int(same.sum()), margin, difference)
