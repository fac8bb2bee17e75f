"""Chat messages to prompt token ids.

The whole rendered text is encoded at once, so the ids equal transformers' for the same template.
Content can't act as a control token: wherever it spells one (such as <|im_start|>), a fence, a
character that occurs nowhere else, is put after the first character of the spelling, goes through
the template with it, and the rendered text is cut there and encoded in pieces. The model then reads
the same characters as ordinary text. Content without such spellings is encoded in one piece,
untouched. Only tokens marked special count; called by admit.py and openai.py.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from models.chat_template import ChatTemplate
from models.tokenizer import Tokenizer
from serve.errors import mistyped, refuse, unsupported

# Unicode noncharacters: valid in a string, never part of a text.
FENCES = tuple(map(chr, range(0xFDD0, 0xFDF0)))
Message = Mapping[str, str]


def join_parts(value: Any) -> str | None:
    """A message content as one string: text parts are joined by newlines, as vLLM's are.

    A pydantic validator: raises for anything but null, a string or a list of text parts.
    """
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise mistyped("should be a string or a non-empty list of text parts")
    return "\n".join(_part_text(part, f"[{at}]") for at, part in enumerate(value))


def _part_text(part: Any, suffix: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise mistyped('should be a part such as {"type": "text", "text": "…"}', suffix)
    if part["type"] != "text":
        text = f"parts of type '{part['type']}' are not supported; this model reads 'text' parts."
        raise unsupported(text, suffix + ".type")
    if set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise mistyped("a text part has the fields 'type' and 'text' (a string), no others", suffix)
    return str(part["text"])


class ChatPrompt:
    """Renders and encodes conversations of one model. Stateless after construction."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        spellings = (tokenizer.token(number) for number in tokenizer.special_ids)
        controls = sorted((s for s in spellings if s), key=len, reverse=True)
        spelled = "|".join(map(re.escape, controls)) or "(?!)"  # (?!) matches nowhere
        self._control = re.compile(f"(?=({spelled}))")  # look-ahead: spellings may overlap
        self._starts = tuple({c[:n] for c in controls for n in range(1, len(c))})
        self._ends = tuple({c[-n:] for c in controls for n in range(1, len(c))})

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Prompt token ids, the assistant's opening included; RequestError 400 when refused."""
        fence = _unused_fence(messages)
        text = self._render([self._fenced(message, fence) for message in messages])
        pieces = text.split(fence)
        if any(self._touches(value) for message in messages for value in _contents(message)):
            self._refuse_formed(messages, fence, pieces)
        return [token for piece in pieces for token in self._tokenizer.encode(piece)]

    def _render(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise refuse("The model has no chat template; use /v1/completions.", "messages")
        try:
            return self._template.render([dict(message) for message in messages])
        except ValueError as error:
            raise refuse(str(error), "messages") from error

    def _fenced(self, message: Message, fence: str, edges: str = "") -> dict[str, str]:
        def fenced(value: str) -> str:
            cuts = [match.start() + 1 for match in self._control.finditer(value)]
            bounds = zip([0, *cuts], [*cuts, len(value)], strict=True)
            return edges + fence.join(value[start:stop] for start, stop in bounds) + edges

        return {key: value if key == "role" else fenced(value) for key, value in message.items()}

    def _touches(self, value: str) -> bool:
        """Could the text before or after this content complete a control token with it?"""
        return value.startswith(self._ends) or value.endswith(self._starts)

    def _refuse_formed(self, messages: Sequence[Message], fence: str, pieces: list[str]) -> None:
        """Refuse when content and template together spell a control token that neither holds.

        Found by rendering again with fences around every content: such a token is then gone.
        """
        apart = self._render([self._fenced(message, fence, edges=fence) for message in messages])
        if self._count(apart.split(fence)) != self._count(pieces):
            text = "The start or end of a message would form a control token with the text around "
            raise refuse(
                text + "it in the chat template; begin and end it differently.", "messages"
            )

    def _count(self, pieces: list[str]) -> int:
        return sum(len(self._control.findall(piece)) for piece in pieces)


def _contents(message: Message) -> Iterator[str]:
    return (value for key, value in message.items() if key != "role")


def _unused_fence(messages: Sequence[Message]) -> str:
    contents = [value for message in messages for value in _contents(message)]
    for fence in FENCES:
        if not any(fence in value for value in contents):
            return fence
    raise refuse("The messages hold all Unicode noncharacters U+FDD0 to U+FDEF.", "messages")
