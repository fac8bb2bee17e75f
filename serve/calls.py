"""Tool calls in the text of an answer, read piece by piece, for streams and whole answers alike.

Pure: what comes out does not depend on how the text is cut into pieces. A call is shown when it is
complete; what looks like one and is not, is content like any other text. Called by stream.py.
"""

import json
from collections.abc import Set
from typing import NamedTuple

from serve.tools import CLOSE, OPEN


class ToolCall(NamedTuple):
    """A call the model made. arguments: JSON text."""

    place: int
    id: str
    name: str
    arguments: str


class Read(NamedTuple):
    """What a piece of text adds."""

    content: str
    calls: tuple[ToolCall, ...] = ()


class CallReader:
    """The calls of one answer. names: the functions there are; most: calls that are read as such;
    ids are made of `answer_id`, so that an answer made again has the same."""

    def __init__(self, names: Set[str], most: int | None, answer_id: str) -> None:
        self.count = 0
        self._names = names
        self._most = most
        self._answer_id = answer_id
        self._held = ""  # the beginning of a tag, or a call that is not closed yet
        self._blank = ""  # white space that is content unless a call follows

    def push(self, text: str) -> Read:
        """Read on; text that may belong to a call is held back."""
        self._held += text
        content: list[str] = []
        calls: list[ToolCall] = []
        while True:
            start = self._held.find(OPEN)
            if start < 0:
                keep = _beginning(self._held)
                content.append(self._shown(self._held[: len(self._held) - keep]))
                self._held = self._held[len(self._held) - keep :]
                break
            stop = self._held.find(CLOSE, start)
            if stop < 0:
                content.append(self._shown(self._held[:start]))
                self._held = self._held[start:]
                break
            before, end = self._held[:start], stop + len(CLOSE)
            made = self._calls(self._held[start + len(OPEN) : stop])
            if made:
                content.append(self._shown(before))
                self._blank = ""
                calls += made
            else:
                content.append(self._shown(self._held[:end]))
            self._held = self._held[end:]
        return Read("".join(content), tuple(calls))

    def flush(self) -> Read:
        """The end: whatever is held back is content."""
        rest = self._blank + self._held if self._held or not self.count else ""
        self._held = self._blank = ""
        return Read(rest)

    def _shown(self, text: str) -> str:
        """Text that is content for sure: trailing white space waits for what follows it."""
        text = self._blank + text
        solid = text.rstrip()
        self._blank = text[len(solid) :]
        return solid

    def _calls(self, body: str) -> list[ToolCall]:
        """The calls in a tag, an object or a list of them; [] when it is not that."""
        try:
            read = json.loads(body)
        except (ValueError, RecursionError):
            return []
        entries = read if isinstance(read, list) else [read]
        if not entries or not all(map(self._is_call, entries)):
            return []
        if self._most is not None and self.count + len(entries) > self._most:
            return []
        made = []
        for entry in entries:
            identity = f"call_{self._answer_id.rpartition('-')[2][-16:]}_{self.count}"
            arguments = json.dumps(entry["arguments"], ensure_ascii=False)
            made.append(ToolCall(self.count, identity, entry["name"], arguments))
            self.count += 1
        return made

    def _is_call(self, entry: object) -> bool:
        return (
            isinstance(entry, dict)
            and set(entry) == {"name", "arguments"}
            and entry["name"] in self._names
            and isinstance(entry["arguments"], dict)
        )


def _beginning(text: str) -> int:
    """How many characters at the end of a text may be the beginning of a tag."""
    return next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
