"""What goes to the other's place where ranks share experts: rows of tokens, or the weights; fixed
by `mesh.expert_travel`, or what has been faster so far (Tutel's switch, Hwang et al. 2022)."""

import time

from train.job import Job
from train.parallel.experts import Tuner
from train.parallel.mesh_model import MeshLlama


class Travel:
    """Of the passes of a rank's steps. All ranks of a world have one and are told the same."""

    def __init__(self, job: Job, model: MeshLlama) -> None:
        self._mixtures, self._tokens = model.mixtures, job.run.batch_tokens
        self._tuner: Tuner | None = None
        self._started_s = 0.0
        for mixture in self._mixtures:
            degrees = mixture.experts.placement.degrees
            mixture.degree = 0 if job.mesh.expert_travel == "weights" else degrees[-1]
            if job.mesh.expert_travel == "auto":
                self._tuner = self._tuner or Tuner(degrees)

    @property
    def degree(self) -> int | None:
        """Of parallelism of the newest step (`Experts`); None without experts."""
        return self._mixtures[0].degree if self._mixtures else None

    def begin(self) -> None:
        """Before the passes of a step."""
        if self._tuner:
            degree = self._tuner.choose(self._tokens)
            for mixture in self._mixtures:
                mixture.degree = degree
        self._started_s = time.monotonic()

    def passed_s(self) -> float:
        """Since then, on this rank."""
        return time.monotonic() - self._started_s

    def end(self, seconds: float) -> None:
        """What passed, of all ranks together."""
        if self._tuner and self.degree is not None:
            self._tuner.tell(self._tokens, self.degree, seconds)
