"""What a request is and everything needed to go on with it elsewhere.

`Request` is what was asked and never changes; `Sequence` adds what has come out so far and, on the
replica that runs it, the pages that hold its KV. `to_bytes` carries request and output, not pages:
KV moves by a hand-off, is fetched from where it is parked or is computed again, and the same tokens
follow either way, since every random draw depends on (seed, position) alone. Used by the engine,
the replicas and the ingress.
"""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter

from serve.grammar.terms import Grammar
from serve.kv.prefix import CacheKey
from serve.kv.table import PageTable

Finish = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; 0 turns top_k off, 1.0 top_p.

    Presence and frequency penalties count the output, repetition_penalty prompt and output; 0, 0
    and 1 turn them off. logit_bias: (token id, what is added to its logit).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Limits:
    """When generation ends. Stops of any kind are ignored before `min_tokens`."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt and its terms; `cache_key` names who may share its prefix.

    priority: lower goes first and takes the place of higher ones. logprobs: with how many of the
    most likely tokens to report each token's log-probability; None reports nothing. group: what
    requests of one and the same prompt have in common, whose pages they then share; "" for none.
    share, turn: the tenant's weight, and the place among equal priorities that it earns (backlog).
    grammar: what the answer must look like; None for anything. embed: no token is wanted but the
    embedding of the prompt, on the last delta. score: no token is wanted but how likely the
    prompt's own tokens are, with so many of the likeliest in each place; None for an answer.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    limits: Limits
    cache_key: CacheKey
    priority: int = 0
    arrival_s: float = 0.0
    logprobs: int | None = None
    group: str = ""
    share: float = 1.0
    turn: float = 0.0
    grammar: Grammar | None = None
    embed: bool = False
    score: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability under the model itself (before temperature,
    penalties and bans), and the most likely tokens with theirs, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What one step added to a sequence.

    token_ids: new tokens, a sampled end or stop token included; may be empty on the last delta.
    finish: None while it goes on. stop: the stop string that matched, if one did.
    cached_tokens: prompt tokens that came from a prefix cache (constant from the first delta on).
    error: a sentence, with finish "error" only. logprobs: one per token, where asked for.
    embedding: of the prompt, where it was asked for; then there are no tokens. scores: of the
    prompt's tokens but the first, which nothing comes before; likewise.
    """

    token_ids: tuple[int, ...]
    finish: Finish | None = None
    stop: str | None = None
    cached_tokens: int = 0
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()
    scores: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Output:
    """A delta of one request; `index` is the place of its first token in the request's output."""

    request_id: str
    index: int
    delta: Delta


@dataclass(frozen=True)
class Parked:
    """KV of a sequence's first `tokens` tokens, kept by a draining replica for `lease_s` more.

    digest: of the cache key and those tokens, so that it is never taken for another sequence's.
    """

    replica_id: str
    lease_id: str
    tokens: int
    digest: str
    lease_s: float


@dataclass(eq=False)
class Sequence:
    """A request under way: `output` so far and its pages while it runs here. Equal to itself only.

    computed_tokens: leading tokens whose KV is in `table`. arrival: order of arrival on this
    replica (ties, preemption). hold: keep the pages after the end, for a hand-off to take.
    waited_steps: steps of this replica in which it had to wait, which raise its rank. parked: where
    its KV waits, for the replica that takes it next. known_tokens: leading tokens that had been
    computed before it came here. exact: False when its KV lost bits on the way, so that nobody else
    may use it.
    """

    request: Request
    output: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    computed_tokens: int = 0
    table: PageTable | None = None
    arrival: int = 0
    hold: bool = False
    waited_steps: int = 0
    parked: Parked | None = None
    known_tokens: int = 0
    exact: bool = True

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def __len__(self) -> int:
        return len(self.request.prompt) + len(self.output)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at absolute positions [start, stop)."""
        prompt = self.request.prompt
        split = len(prompt)
        head = prompt[start : min(stop, split)] if start < split else ()
        tail = self.output[max(start - split, 0) : max(stop - split, 0)]
        return [*head, *tail]

    @property
    def uncomputed_tokens(self) -> int:
        return len(self) - self.computed_tokens

    def to_bytes(self) -> bytes:
        """Everything that another replica needs to go on, as versioned JSON (never pickle)."""
        body = _Body(2, self.request, self.output, self.cached_tokens, self.parked)
        return _BODY.dump_json(body)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Sequence":
        """The inverse of `to_bytes`; ValueError for another format or a malformed body."""
        body = _BODY.validate_json(data, strict=True, extra="forbid")
        return cls(body.request, body.output, body.cached_tokens, parked=body.parked)


@dataclass(frozen=True)
class _Body:
    """A sequence as it crosses between processes."""

    format: Literal[2]
    request: Request
    output: list[int]
    cached_tokens: int
    parked: Parked | None


_BODY = TypeAdapter(_Body)
