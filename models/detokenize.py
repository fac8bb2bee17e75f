"""Token ids to text, a few at a time, without ever showing half a character.

Used once per stream by the HTTP edge and by stop strings. What is pushed out adds up, character
for character, to `Tokenizer.decode` of all ids together.
"""

import codecs
import re
from collections.abc import Iterable

from models.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest for 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_of_character()


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that one token stands for, alone: often half a character. b"" for no token."""
    spelling = tokenizer.token(token_id) or ""
    if tokenizer.form.kind == "pieces":
        byte = _BYTE_TOKEN.fullmatch(spelling)
        if byte:
            return bytes([int(byte[1], 16)])
        return spelling.replace(tokenizer.form.mark, " ").encode()
    return _alphabet_bytes(spelling)


def _alphabet_bytes(spelling: str) -> bytes:
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in spelling])
    except KeyError:  # an added token, written as plain text
        return spelling.encode()


class Detokenizer:
    """The text of one growing sequence. Special tokens are dropped."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()
        self._strip = tokenizer.form.strip
        bytes_kind = tokenizer.form.kind == "bytes"
        self._step = self._push_bytes if bytes_kind else self._push_piece

    def push(self, ids: Iterable[int]) -> str:
        """The text that these further ids complete; may be empty."""
        special, token = self._tokenizer.special_ids, self._tokenizer.token
        spellings = (token(number) for number in ids if number not in special)
        return "".join(self._step(spelling) for spelling in spellings if spelling is not None)

    def flush(self) -> str:
        """The rest at the end of the sequence; unfinished characters become U+FFFD."""
        return self._utf8.decode(b"", final=True) + self._end_run()

    def _push_bytes(self, spelling: str) -> str:
        return self._utf8.decode(_alphabet_bytes(spelling))

    def _push_piece(self, spelling: str) -> str:
        """A run of byte tokens is one unit to the decoder: valid as a whole or not at all. So it
        is held until a token that is not a byte follows."""
        byte = _BYTE_TOKEN.fullmatch(spelling)
        if byte:
            self._run.append(int(byte[1], 16))
            return ""
        return self._end_run() + self._stripped(spelling.replace(self._tokenizer.form.mark, " "))

    def _end_run(self) -> str:
        raw, self._run = bytes(self._run), bytearray()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(raw)
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        """Drops the spaces that the decoder strips from the beginning of the whole text."""
        if not self._strip or not text:
            return text
        kept = text.lstrip(" ")
        spaces = min(len(text) - len(kept), self._strip)
        # Only an unbroken run of spaces at the very start counts.
        self._strip = self._strip - spaces if not kept else 0
        return text[spaces:]
