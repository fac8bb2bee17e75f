"""Sequences of one group: one prompt, computed once, whose pages all of them share.

The first of a group to find room computes the prompt; the others wait for it and then fork its page
table, down to the page that the prompt only begins, which is copied when somebody writes to it.
Called by the scheduler.
"""

from serve.engine.sequence import Sequence
from serve.kv.table import PageTable


class Siblings:
    """Who of each group is here. Owns no pages."""

    def __init__(self) -> None:
        self._groups: dict[str, list[Sequence]] = {}

    def join(self, sequence: Sequence) -> None:
        if sequence.request.group:
            self._groups.setdefault(sequence.request.group, []).append(sequence)

    def leave(self, sequence: Sequence) -> None:
        group = sequence.request.group
        if group:
            self._groups[group].remove(sequence)
            if not self._groups[group]:
                del self._groups[group]

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether a sibling is computing the prompt right now, here or elsewhere."""
        lead = self._lead(sequence)
        return lead is not None and not _computed(lead)

    def fork(self, sequence: Sequence) -> tuple[PageTable, int] | None:
        """A table over a sibling's prompt pages, and how many tokens of `sequence` it holds, at
        least one fewer than it has; None when no sibling has computed the prompt."""
        lead = self._lead(sequence)
        if lead is None or not _computed(lead):
            return None
        assert lead.table is not None
        table = lead.table.fork()
        table.truncate(len(sequence.request.prompt))
        return table, min(len(sequence.request.prompt), len(sequence) - 1)

    def shared_pages(self, sequence: Sequence) -> int:
        """Whole pages that a fork would not have to find room for."""
        lead = self._lead(sequence)
        if lead is None or not _computed(lead):
            return 0
        assert lead.table is not None
        return (len(sequence.request.prompt) - 1) // lead.table.pool.page_tokens

    def _lead(self, sequence: Sequence) -> Sequence | None:
        """The sibling that is furthest with the prompt."""
        group = self._groups.get(sequence.request.group, ())
        others = (s for s in group if s is not sequence and s.table is not None and s.exact)
        return max(others, key=lambda s: s.computed_tokens, default=None)


def _computed(sequence: Sequence) -> bool:
    return sequence.computed_tokens >= len(sequence.request.prompt)
