"""Matrices that start out unset: a checkpoint, a cache or an initialiser fills them.

torch's own modules draw random values on construction, which costs seconds for a model whose
values are about to be overwritten, and touches memory that a mapped cache never needs.
"""

from torch import nn


class Linear(nn.Linear):
    """nn.Linear without random initialisation."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is."""


class Embedding(nn.Embedding):
    """nn.Embedding without random initialisation."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is."""
