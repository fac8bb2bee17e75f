"""How likely a prompt's own tokens are: the logits of every place but the last, chunk by chunk.

Owns what has been scored of the prompts under way. Called by Engine.step, which samples from the
rows that are left.
"""

from torch import Tensor

from serve.engine.logprobs import report
from serve.engine.runner import Rows
from serve.engine.scheduler import Slice
from serve.engine.sequence import TokenLogprob


class Scores:
    """Scores of prompts under way, by request id."""

    def __init__(self) -> None:
        self._scored: dict[str, list[TokenLogprob]] = {}

    def take(self, slices: list[Slice], rows: Rows) -> Rows:
        """Score what a step computed; what is left are the rows of the slices with `samples`."""
        if all(piece.sequence.request.score is None for piece in slices):
            return rows
        kept, first = [], 0
        for piece in slices:
            after = first + piece.rows
            if piece.sequence.request.score is not None:
                self._score(piece, rows.logits[first:after])
            if piece.samples:
                kept.append(after - 1)
            first = after
        return Rows(rows.logits[kept], rows.states[kept])

    def pop(self, request_id: str) -> tuple[TokenLogprob, ...]:
        """What was scored, and forget it; empty when nothing was."""
        return tuple(self._scored.pop(request_id, ()))

    def _score(self, piece: Slice, logits: Tensor) -> None:
        """logits [stop - start, vocab]: of each token in the slice, for the one after it."""
        if piece.start == 0:  # from the beginning again after a preemption
            self._scored[piece.sequence.request_id] = []
        prompt = piece.sequence.request.prompt
        following = prompt[piece.start + 1 : piece.stop + 1]
        wanted = [piece.sequence.request.score] * len(following)
        made = report(logits[: len(following)], following, wanted)
        scored = self._scored[piece.sequence.request_id]
        scored.extend(entry for entry in made if entry is not None)
