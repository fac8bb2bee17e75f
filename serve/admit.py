"""From a well-formed request to one the engine can run: numbers checked, defaults filled in.

Owns what depends on the model (its name, context length, vocabulary) and on chance (seeds, ids).
Synchronous and free of I/O; http.py runs it in a thread when the text is long. The salt of the
cache key comes from the caller's API key (keys.py), never from the body.
"""

import random
from dataclasses import dataclass, replace

from cluster.clock import Clock
from models.load.text import TextModel
from serve.chat import ChatPrompt
from serve.embeddings import EmbeddingRequest
from serve.engine.draws import derived_seed
from serve.engine.sequence import Limits, Request, Sampling
from serve.errors import RequestError, refuse
from serve.grammar.compiler import Compiler
from serve.grammar.terms import Grammar
from serve.kv.prefix import CacheKey
from serve.openai import ChatRequest, CompletionRequest, GenerationRequest
from serve.texts import DetokenizeRequest, TokenizeRequest
from serve.tools import with_tools

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


@dataclass(frozen=True)
class Caller:
    """Who asks. salt: the tenant, keeps the prefix caches of tenants apart; share: its weight."""

    salt: str = ""
    priority: int = 0
    share: float = 1.0


class Admission:
    """Turns parsed requests for one model into engine requests.

    context_tokens: the longest prompt plus answer, at most the model's own. chance draws seeds and
    ids; clock stamps arrivals.
    """

    def __init__(
        self,
        text: TextModel,
        model: str,
        *,
        context_tokens: int,
        chance: random.Random,
        clock: Clock,
    ) -> None:
        self.model = model
        self.context_tokens = context_tokens
        self._tokenizer = text.tokenizer
        self._chat = ChatPrompt(text.tokenizer, text.chat_template)
        self._grammars = Compiler(text.tokenizer)
        self._chance = chance
        self._hidden = text.config.hidden
        self._clock = clock

    def chat(self, body: ChatRequest, caller: Caller) -> Request:
        """A chat completion; without a maximum it may fill the rest of the context."""
        self.known(body.model)
        messages = [message.for_template() for message in body.messages]
        prompt = self._chat.ids(with_tools(messages, body.offered_tools))
        return self._request("chatcmpl", body, tuple(prompt), "messages", None, caller)

    def completion(self, body: CompletionRequest, caller: Caller) -> Request:
        """A completion of raw text, in which control tokens are read as such, or of token ids."""
        self.known(body.model)
        prompt = self._prompt(body.prompt, "prompt")
        default = DEFAULT_COMPLETION_TOKENS
        return self._request("cmpl", body, prompt, "prompt", default, caller)

    def tokenize(self, body: TokenizeRequest) -> list[int]:
        """The ids that a chat or a completion with this prompt would begin with."""
        self.known(body.model)
        if body.messages is not None:
            return self._chat.ids([message.for_template() for message in body.messages])
        prefix = self._tokenizer.prompt_prefix if body.add_special_tokens else ()
        return [*prefix, *self._tokenizer.encode(body.prompt or "")]

    def detokenize(self, body: DetokenizeRequest) -> str:
        """The text of ids, control tokens spelled out."""
        self.known(body.model)
        self._in_vocabulary(tuple(body.tokens), "tokens")
        return self._tokenizer.decode(body.tokens, skip_special=False)

    def spellings(self, ids: list[int]) -> list[str]:
        """Each id's own spelling in the vocabulary."""
        return [self._tokenizer.token(token) or "" for token in ids]

    def embeddings(self, body: EmbeddingRequest, caller: Caller) -> list[Request]:
        """A request for each input. RequestError 400 for dimensions that the model has not."""
        self.known(body.model)
        if body.dimensions > self._hidden:
            text = f"'dimensions' is {body.dimensions}; this model's embeddings have "
            raise refuse(f"{text}{self._hidden}.", "dimensions", "invalid_value")
        name = f"embd-{self._chance.getrandbits(96):024x}"
        return [
            self._embedding(f"{name}-{index}", one, f"input[{index}]", caller)
            for index, one in enumerate(body.input)
        ]

    def _embedding(
        self, name: str, text: str | tuple[int, ...], param: str, caller: Caller
    ) -> Request:
        prompt = self._prompt(text, param)
        self._room(prompt, param)
        return Request(
            request_id=name,
            prompt=prompt,
            sampling=Sampling(temperature=0.0),
            limits=Limits(1),
            cache_key=CacheKey(salt=caller.salt, adapter="", effort=""),
            priority=caller.priority,
            arrival_s=self._clock.now_s(),
            share=caller.share,
            embed=True,
        )

    def _prompt(self, prompt: str | tuple[int, ...], param: str) -> tuple[int, ...]:
        """Token ids of a raw prompt; RequestError 400 for one that is no token of this model."""
        if isinstance(prompt, str):
            prompt = (*self._tokenizer.prompt_prefix, *self._tokenizer.encode(prompt))
        self._in_vocabulary(prompt, param)
        return prompt

    def choices(self, request: Request, count: int) -> list[Request]:
        """`count` requests that differ in their seeds and share the pages of their prompt; the
        first one is the request itself."""
        if count == 1:
            return [request]
        name, sampling = request.request_id, request.sampling
        return [
            replace(
                request,
                request_id=f"{name}-{index}" if index else name,
                group=name,
                sampling=replace(sampling, seed=derived_seed(sampling.seed, index)),
            )
            for index in range(count)
        ]

    def echo(self, body: CompletionRequest) -> str:
        """The prompt as text."""
        prompt = body.prompt
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special=False)

    def known(self, model: str) -> None:
        """RequestError 404 for any model but the one that is served."""
        if model != self.model:
            text = f"The model '{model}' does not exist; this server has '{self.model}'."
            raise RequestError(404, "invalid_request_error", "model", text, "model_not_found")

    def _request(
        self,
        prefix: str,
        body: GenerationRequest,
        prompt: tuple[int, ...],
        param: str,
        default_tokens: int | None,
        caller: Caller,
    ) -> Request:
        rest = self._room(prompt, param)
        wanted = body.wanted_tokens
        self._fits(len(prompt), wanted, param)
        max_tokens = wanted or min(rest, default_tokens or rest)
        return Request(
            request_id=f"{prefix}-{self._chance.getrandbits(96):024x}",
            prompt=prompt,
            sampling=self._sampling(body),
            limits=self._limits(body, max_tokens),
            cache_key=CacheKey(salt=caller.salt, adapter="", effort=""),
            priority=self._priority(body, caller),
            arrival_s=self._clock.now_s(),
            logprobs=body.reported_logprobs,
            share=caller.share,
            grammar=self._grammar(body),
        )

    def _room(self, prompt: tuple[int, ...], param: str) -> int:
        """Tokens that the context has left after the prompt; at least one, or it is refused."""
        if not prompt:
            raise refuse("The prompt is empty; it should hold at least one token.", param)
        if len(prompt) >= self.context_tokens:
            raise refuse(
                f"The prompt has {len(prompt)} tokens; this model's context holds "
                f"{self.context_tokens}, of which at least one is for the answer.",
                param,
                "context_length_exceeded",
            )
        return self.context_tokens - len(prompt)

    def _fits(self, prompt_tokens: int, wanted_tokens: int | None, param: str) -> None:
        if wanted_tokens is not None and prompt_tokens + wanted_tokens > self.context_tokens:
            raise refuse(
                f"The prompt has {prompt_tokens} tokens and {wanted_tokens} are asked for the "
                f"answer, {prompt_tokens + wanted_tokens} together; this model's context holds "
                f"{self.context_tokens}.",
                param,
                "context_length_exceeded",
            )

    def _priority(self, body: GenerationRequest, caller: Caller) -> int:
        """The key's and the request's together; a tenant can't be more urgent than its key says."""
        asked = body.priority or 0
        if asked < 0 and caller.salt:
            text = f"'priority' is {asked}; with an API key, 0 (the key's own) to 100 are accepted."
            raise refuse(text, "priority", "invalid_value")
        return caller.priority + asked

    def _sampling(self, body: GenerationRequest) -> Sampling:
        seed = self._chance.getrandbits(63) if body.seed is None else body.seed
        top_p = 1.0 if body.top_p is None else float(body.top_p)
        top_k = max(body.top_k or 0, 0)  # -1 is vLLM's way to say off
        return Sampling(
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_k=top_k if top_p else 1,  # the smallest nucleus is the likeliest token alone
            top_p=top_p or 1.0,
            min_p=float(body.min_p or 0.0),
            seed=seed,
            presence_penalty=float(body.presence_penalty or 0.0),
            frequency_penalty=float(body.frequency_penalty or 0.0),
            repetition_penalty=float(body.repetition_penalty or 1.0),
            logit_bias=self._biases(body.logit_bias or {}),
        )

    def _biases(self, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
        """(token id, bias), sorted; RequestError for a key that is no token id of this model."""
        size = self._tokenizer.vocab_size
        for key in biases:
            if not (key.isascii() and key.isdecimal() and int(key) < size):
                text = f"'logit_bias' has the key {key!r}; token ids of this model are 0 to "
                raise refuse(f"{text}{size - 1}.", "logit_bias", "invalid_value")
        return tuple(sorted((int(key), float(value)) for key, value in biases.items()))

    def _limits(self, body: GenerationRequest, max_tokens: int) -> Limits:
        stop_token_ids = tuple(body.stop_token_ids or ())
        self._in_vocabulary(stop_token_ids, "stop_token_ids")
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            text = f"'min_tokens' is {min_tokens}, above the maximum of {max_tokens} tokens."
            raise refuse(text, "min_tokens", "invalid_value")
        return Limits(max_tokens, min_tokens, stop_token_ids, body.stop, bool(body.ignore_eos))

    def _grammar(self, body: GenerationRequest) -> Grammar | None:
        """What the answer must look like. A 400 when that doesn't compile, or when the request
        also wants the answer to go on after its form is complete."""
        grammar, param = body.grammar
        if grammar is None:
            return None
        for name, given in (("min_tokens", body.min_tokens), ("ignore_eos", body.ignore_eos)):
            if given:
                text = f"'{name}' is not supported with '{param}', which says when an answer ends."
                raise refuse(text, name, "unsupported_value")
        try:
            self._grammars.matcher(grammar)
        except ValueError as error:
            text = f"Invalid value for '{param}': the {grammar.kind} is not accepted: {error}"
            raise refuse(text.removesuffix(".") + ".", param, "invalid_value") from error
        return grammar

    def _in_vocabulary(self, ids: tuple[int, ...], param: str) -> None:
        size = self._tokenizer.vocab_size
        for at, token in enumerate(ids):
            if not 0 <= token < size:
                text = f"'{param}[{at}]' is {token}; token ids of this model are 0 to {size - 1}."
                raise refuse(text, f"{param}[{at}]", "invalid_value")
