"""Stop strings in a text that arrives in pieces.

Owns the tail of the text that could still turn into a stop string. Promises that what it lets out
and what it matches depend on the text alone, never on how the text was cut into pieces, so that the
engine (which ends a sequence) and the HTTP edge (which cuts its text) always agree.
"""

from typing import NamedTuple


class StopText(NamedTuple):
    """Text that is safe to show, and the stop string that ended it, if one did."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Lets text through until one of `strings` has appeared in it; no strings: all text passes.

    The match is the one that is complete first; of several complete at the same character, the
    longest. ValueError for an empty stop string, which would match before any text.
    """

    def __init__(self, strings: tuple[str, ...] = ()) -> None:
        if not all(strings):
            raise ValueError("a stop string is empty; a stop string has at least one character")
        self._strings = tuple(strings)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> StopText:
        """Add text; returns what can no longer be part of a stop string, or ends before one."""
        assert self.matched is None, "text was pushed after a stop string had matched"
        text = self._held + text
        ends = [(at + len(s), -len(s), s) for s in self._strings if (at := text.find(s)) >= 0]
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return StopText(text[: end - len(self.matched)], self.matched)
        safe = len(text) - self._partial(text)
        self._held = text[safe:]
        return StopText(text[:safe])

    def flush(self) -> StopText:
        """The held-back tail, once no more text will come."""
        text, self._held = self._held, ""
        return StopText(text, self.matched)

    def _partial(self, text: str) -> int:
        """Length of the longest tail of `text` that is a proper prefix of a stop string."""
        longest = 0
        for string in self._strings:
            for length in range(min(len(string) - 1, len(text)), longest, -1):
                if text.endswith(string[:length]):
                    longest = length
                    break
        return longest
