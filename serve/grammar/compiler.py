"""From a grammar to the tokens that it allows next, for one tokenizer, by the library llguidance.

The work of compiling and of every step is bounded by counts of the library's own (never by wall
time, which would refuse on a busy machine what it accepts on an idle one). A matcher's state is a
function of the tokens alone, so another replica reaches it by reading the output again. Called by
the edge, which refuses what does not compile, and by the engine.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance import TokenizerWrapper
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from models.detokenize import token_bytes
from models.tokenizer import Tokenizer
from serve.grammar.terms import Grammar

MAX_SOURCE_BYTES = 65_536
MAX_DEPTH = 64  # of brackets within brackets, in any of the notations
CACHED_GRAMMARS = 64
# Unbounded white space is where a model that does not know what to say stays until max_tokens.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
BRACKETS = {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Matcher:
    """Where one answer stands in its grammar. `failure` is a sentence once it can't go on."""

    def __init__(self, state: llguidance.LLMatcher, vocab: int) -> None:
        self._state = state
        self._vocab = vocab
        self.failure: str | None = None

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[vocab] mask of the next token; end tokens exactly where the answer may end.

        All False, and `failure` set, when the library's bounds are reached.
        """
        mask = np.zeros(self._vocab, dtype=np.bool_)
        if self.failure is None:
            bits = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
            self._notice()
            if self.failure is None:
                mask[:] = np.unpackbits(bits, bitorder="little")[: self._vocab]
        return mask

    def consume(self, token: int) -> None:
        """Go on by one token of the output. A token that is not allowed is a failure."""
        if self.failure is None:
            self._state.consume_token(token)
            self._notice()

    def _notice(self) -> None:
        if self._state.is_error():
            self.failure = f"The answer's grammar can't go on: {_line(self._state.get_error())}"


class Compiler:
    """Grammars of one tokenizer, the latest `CACHED_GRAMMARS` of them ready. Any thread may call.

    Reading the vocabulary takes a third of a second, and happens with the first grammar.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._library: llguidance.LLTokenizer | None = None
        self._ready: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar, output: Iterable[int] = ()) -> Matcher:
        """At the start of an answer, or after the tokens in `output`. ValueError with the reason
        when the grammar is malformed, too large, or uses what the library does not know."""
        with self._lock:
            compiled = self._compiled(grammar)
            made = Matcher(compiled.deep_copy(), self._tokenizer.vocab_size)
        for token in output:
            made.consume(token)
        return made

    def _compiled(self, grammar: Grammar) -> llguidance.LLMatcher:
        if grammar in self._ready:
            self._ready.move_to_end(grammar)
            return self._ready[grammar]
        compiled = llguidance.LLMatcher(
            self._vocabulary(), _notation(grammar), log_level=0, limits=LIMITS
        )
        if compiled.is_error():
            raise ValueError(_line(compiled.get_error()))
        self._ready[grammar] = compiled
        if len(self._ready) > CACHED_GRAMMARS:
            self._ready.popitem(last=False)
        return compiled

    def _vocabulary(self) -> llguidance.LLTokenizer:
        if self._library is None:
            ends = list(self._tokenizer.eos_token_ids)
            spelled = TokenizerWrapper(_Vocabulary(self._tokenizer))
            self._library = llguidance.LLTokenizer(spelled, eos_token=ends)
        return self._library


class _Vocabulary:
    """Our vocabulary as the library asks for it: the bytes of every token, exactly as an answer
    will show them, whatever the tokenizer does to text before it splits it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [token_bytes(tokenizer, token) for token in range(tokenizer.vocab_size)]
        special = tokenizer.special_ids
        self._ids = {raw: n for n, raw in enumerate(self.tokens) if raw and n not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Tokens that spell `text`, the longest first. The library looks ahead with it; which
        tokens an answer is made of stays the model's choice."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            stop = min(start + self._longest, len(text))
            while text[start:stop] not in self._ids:
                stop -= 1
                if stop == start:  # a byte without a token: nothing can spell the rest
                    return ids
            ids.append(self._ids[text[start:stop]])
            start = stop
        return ids


def _notation(grammar: Grammar) -> str:
    """The grammar as the library reads it. ValueError when it is too large or malformed."""
    size = len(grammar.source.encode())
    if size > MAX_SOURCE_BYTES:
        raise ValueError(f"it has {size} bytes; at most {MAX_SOURCE_BYTES} are accepted")
    depth = deepest = 0
    for character in grammar.source:
        depth += BRACKETS.get(character, 0)
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ValueError(f"it is nested {deepest} deep; at most {MAX_DEPTH} is accepted")
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "ebnf":
        try:
            return llguidance.LLMatcher.grammar_from_lark(any_to_lark(grammar.source))
        except GbnfToLarkError as error:
            raise ValueError(_line(str(error))) from None
    schema = {"type": "object"} if grammar.kind == "json_object" else json.loads(grammar.source)
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise ValueError("'x-guidance' is not accepted; it would lift this server's bounds")
    return llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE}
    )


def _line(message: str) -> str:
    """The library's message, which may show an excerpt over several lines, as one."""
    return " ".join(message.split())
