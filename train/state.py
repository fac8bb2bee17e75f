"""What a training run is between two steps, whole: everything that a checkpoint has to keep."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KINDS = ("param", "master", "exp_avg", "exp_avg_sq")
"""Prefixes of tensor names: weights as computed with, float32 masters (where weights are not
float32 or float64 themselves), and the optimizer's moments. An optimizer may add kinds of its own
(see its `kinds`)."""


@dataclass
class TrainState:
    """State after `step` finished optimizer steps.

    samples: training samples consumed so far, which is all that the data stream has to know;
    tensors: by "<kind>/<parameter's name>", the same on every rank of data parallel workers, live
    (a step changes them in place: copy what must not change); meta: JSON values, such as the job's
    fingerprint; ranks: what differs by rank (what compression still owes), this rank's alone, or
    of all of them where the state was read from a checkpoint.
    """

    step: int
    samples: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    ranks: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def copy_to(self, mine: "TrainState") -> None:
        """Copies its values to the live tensors of another. ValueError, and nothing copied, where
        one is missing or of another shape."""
        for name, tensor in mine.tensors.items():
            given = self.tensors.get(name)
            if given is None or given.shape != tensor.shape:
                found = "nothing" if given is None else f"shape {tuple(given.shape)}"
                raise ValueError(f"state: {name} needs {tuple(tensor.shape)}, found {found}.")
        with torch.no_grad():
            for name, tensor in mine.tensors.items():
                tensor.copy_(self.tensors[name])

    def of_kind(self, kind: str) -> dict[str, Tensor]:
        """Tensors of one kind, by the parameter's name."""
        prefix = f"{kind}/"
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}
