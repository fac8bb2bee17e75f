"""One model on one replica: schedule, run, sample, commit. Single-threaded; knows no Ray, no HTTP.

`step()` is the whole inner loop. Sequences enter by `add` (this replica computes their prompt) or
by `reserve` then `adopt` (another replica computed it and its pages were copied in between) or
`resume` (another replica was in the middle of it), and leave in the step that ends them, or by
`park`. A `hold` sequence makes one token and leaves; its pages, like a parked one's, stay until
`free_held`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from models.detokenize import Detokenizer
from serve.engine.embedding import unit
from serve.engine.logprobs import report
from serve.engine.runner import Runner
from serve.engine.sampler import Draw, sample
from serve.engine.scheduler import Scheduler, Slice
from serve.engine.scores import Scores
from serve.engine.sequence import Delta, Finish, Output, Sequence, TokenLogprob
from serve.engine.stats import EngineStats
from serve.engine.stops import StopMatcher

if TYPE_CHECKING:
    from serve.grammar.compiler import Compiler, Matcher


@dataclass
class _StopText:
    """Watches the text of a sequence with stop strings; text before min_tokens cannot match."""

    detokenizer: Detokenizer
    matcher: StopMatcher
    min_tokens: int

    def push(self, token: int, produced: int) -> str | None:
        text = self.detokenizer.push([token])
        return self.matcher.push(text).matched if produced >= self.min_tokens else None


class Engine:
    """Runs sequences to their end. Owns them while they are here, and their page tables."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        eos_token_ids: tuple[int, ...],
        detokenizer: Callable[[], Detokenizer],
        grammars: "Compiler | None" = None,
    ) -> None:
        """grammars: None where requests have none; one that has is then refused."""
        self.scheduler = scheduler
        self.runner = runner
        self.eos_token_ids = eos_token_ids
        self.detokenizer = detokenizer
        self.sequences: dict[str, Sequence] = {}
        self.reserved: dict[str, Sequence] = {}
        self.held: dict[str, Sequence] = {}
        self.grammars = grammars
        self._stops: dict[str, _StopText] = {}
        self._matchers: dict[str, Matcher] = {}
        self.scores = Scores()
        self._arrivals = 0
        self.prompt_tokens = self.generated_tokens = self.steps = self.recomputed_tokens = 0
        self.step_cost = 0.0  # of the last step, in the scheduler's tokens
        self.progressed = True  # False when the last step found sequences but no pages for them

    def step(self) -> list[Output]:
        """Compute one batch and return what it added; [] when there is nothing to do."""
        slices = self.scheduler.schedule()
        self.progressed = bool(slices)
        self.step_cost = sum(self.scheduler.cost.of(s.start, s.stop) for s in slices)
        if not slices:
            return []
        logits, states = self.scores.take(slices, self.runner.run(slices))
        sampling = [piece for piece in slices if piece.samples]
        tokens = sample(logits, [self._draw(piece.sequence) for piece in sampling])
        logprobs = report(logits, tokens, [p.sequence.request.logprobs for p in sampling])
        self._computed(slices)
        self.steps += 1
        made = zip(sampling, tokens, logprobs, states, strict=True)
        return [
            self._end_of_prompt(piece.sequence, state)
            if piece.sequence.request.embed or piece.sequence.request.score is not None
            else self._emit(piece.sequence, token, logprob)
            for piece, token, logprob, state in made
        ]

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence, prompt and output, that the pages of this replica can hold."""
        return self.scheduler.pool.pages * self.scheduler.pool.page_tokens

    def add(self, sequence: Sequence, *, hold: bool = False) -> None:
        """Queue a sequence. ValueError when it is known already or can never fit."""
        self._refuse(sequence)
        self._register(sequence)
        sequence.hold = hold
        self.scheduler.waiting.append(sequence)

    def reserve(self, sequence: Sequence) -> bool:
        """Take pages for a sequence whose KV another replica computes; False when pages are short.

        Afterwards `sequence.computed_tokens` says how many leading tokens are here already.
        ValueError as in `add`.
        """
        self._refuse(sequence)
        if not self.scheduler.reserve(sequence):
            return False
        self._register(sequence)
        self.reserved[sequence.request_id] = sequence
        return True

    def adopt(self, request_id: str, token: int, logprob: TokenLogprob | None = None) -> Output:
        """Run a reserved sequence whose pages are filled, `token` being the next of its output."""
        sequence = self.reserved.pop(request_id)
        sequence.computed_tokens = len(sequence)
        self.scheduler.remember(sequence)
        self.scheduler.running.append(sequence)
        self.prompt_tokens += len(sequence)
        return self._emit(sequence, token, logprob)

    def resume(self, request_id: str, computed_tokens: int) -> None:
        """Run a reserved sequence whose pages hold its first `computed_tokens` tokens."""
        sequence = self.reserved.pop(request_id)
        assert computed_tokens < len(sequence), "a token must be left to compute"
        sequence.computed_tokens = max(sequence.computed_tokens, computed_tokens)
        self.scheduler.remember(sequence)
        self.scheduler.running.append(sequence)

    def park(self, request_id: str) -> Sequence | None:
        """Take a sequence out between two steps and hold its pages (`free_held`); None when it is
        not here or nothing of it is computed that could go on elsewhere."""
        sequence = self.sequences.get(request_id)
        if sequence is None or request_id in self.reserved or not movable_tokens(sequence):
            return None
        self._leave(sequence, keep_pages=True)
        return sequence

    def give_up_reservation(self, request_id: str) -> None:
        """Turn a reservation into an ordinary sequence that is computed here."""
        sequence = self.reserved.pop(request_id, None)
        if sequence is not None:
            self.scheduler.release(sequence)
            self.scheduler.waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Drop a sequence in any state and free its pages; False when it is not here (any more)."""
        held = self.free_held(request_id)
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            self._leave(sequence)
        return sequence is not None or held

    def free_held(self, request_id: str) -> bool:
        """Free the pages of a `hold` sequence that has made its token; False when already done."""
        sequence = self.held.pop(request_id, None)
        if sequence is not None:
            self.scheduler.release(sequence)
        return sequence is not None

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            reserved=len(self.reserved),
            held=len(self.held),
            pages=scheduler.pool.pages,
            free_pages=scheduler.pool.free_pages,
            evictable_pages=scheduler.tree.evictable_pages,
            preemptions=scheduler.preemptions,
            prefix_queries_tokens=scheduler.tree.queries_tokens,
            prefix_hits_tokens=scheduler.tree.hits_tokens,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            steps=self.steps,
            recomputed_tokens=self.recomputed_tokens,
        )

    def check(self) -> None:
        """Invariants of pool, tree and queues; AssertionError names the first that fails."""
        scheduler = self.scheduler
        scheduler.check()
        scheduler.tree.check()
        known = set(self.sequences)
        here = {s.request_id for s in (*scheduler.running, *scheduler.waiting)}
        assert known == here | set(self.reserved), "a sequence is registered but in no queue"
        tables = [s.table for s in (*self.sequences.values(), *self.held.values()) if s.table]
        for table in tables:
            table.check()
        scheduler.pool.check([*(table.pages for table in tables), scheduler.tree.pages()])

    def refuse_impossible(self, sequence: Sequence) -> None:
        """ValueError when the sequence could not run even alone. Callable from any thread."""
        request = sequence.request
        if not request.prompt:
            raise ValueError("the prompt is empty; at least 1 token is needed to continue from")
        if request.grammar is not None:
            if self.grammars is None:
                raise ValueError("the request has a grammar, and this engine was given no compiler")
            self.grammars.matcher(request.grammar)
        left = request.limits.max_tokens - len(sequence.output)
        if left < 1:
            raise ValueError(f"max_tokens leaves {left} tokens to make; at least 1 is needed")
        longest = len(sequence.request.prompt) + sequence.request.limits.max_tokens
        if longest > self.capacity_tokens:
            raise ValueError(
                f"prompt and max_tokens together are {longest} tokens; this replica holds at most "
                f"{self.capacity_tokens} (engine.kv_tokens)"
            )

    def _refuse(self, sequence: Sequence) -> None:
        self.refuse_impossible(sequence)
        if sequence.request_id in self.sequences or sequence.request_id in self.held:
            raise ValueError(f"request {sequence.request_id} is already here")

    def _register(self, sequence: Sequence) -> None:
        limits = sequence.request.limits
        if limits.stop:
            watcher = _StopText(self.detokenizer(), StopMatcher(limits.stop), limits.min_tokens)
            self._stops[sequence.request_id] = watcher
            # Resumed here: the held-back tails are a function of what came out so far.
            for produced, token in enumerate(sequence.output, start=1):
                watcher.push(token, produced)
        if sequence.request.grammar is not None:
            assert self.grammars is not None
            matcher = self.grammars.matcher(sequence.request.grammar, sequence.output)
            self._matchers[sequence.request_id] = matcher
        self.sequences[sequence.request_id] = sequence
        self.scheduler.siblings.join(sequence)
        self._arrivals += 1
        sequence.arrival = self._arrivals

    def _draw(self, sequence: Sequence) -> Draw:
        limits = sequence.request.limits
        early = len(sequence.output) < limits.min_tokens
        banned = (*self.eos_token_ids, *limits.stop_token_ids) if early else ()
        matcher = self._matchers.get(sequence.request_id)
        allowed = matcher.allowed() if matcher is not None else None
        request = sequence.request
        return Draw(
            request.sampling, len(sequence), banned, request.prompt, sequence.output, allowed
        )

    def _computed(self, slices: list[Slice]) -> None:
        """Account for the K/V that the step wrote, and share finished prompts."""
        for piece in slices:
            piece.sequence.computed_tokens = piece.stop
            self._count_again(piece)
            if piece.stop - piece.start > 1 or not piece.sequence.output:
                self.prompt_tokens += piece.stop - piece.start
                if piece.samples:
                    self.scheduler.remember(piece.sequence)

    def _count_again(self, piece: Slice) -> None:
        """Count what had been computed before the sequence came here, once."""
        sequence = piece.sequence
        self.recomputed_tokens += max(0, min(piece.stop, sequence.known_tokens) - piece.start)
        if piece.stop >= sequence.known_tokens:
            sequence.known_tokens = 0

    def _emit(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Output:
        """Append a token, decide whether it ends the sequence, and say so."""
        index = len(sequence.output)
        matcher = self._matchers.get(sequence.request_id)
        if matcher is not None:
            matcher.consume(token)
            if matcher.failure is not None:
                self._leave(sequence)
                error = Delta((), "error", None, sequence.cached_tokens, matcher.failure)
                return Output(sequence.request_id, index, error)
        sequence.output.append(token)
        self.generated_tokens += 1
        finish, stop = self._finish(sequence, token)
        logprobs = () if logprob is None else (logprob,)
        delta = Delta((token,), finish, stop, sequence.cached_tokens, logprobs=logprobs)
        if finish is not None or sequence.hold:
            self.scheduler.remember(sequence)
            self._leave(sequence, keep_pages=sequence.hold)
        return Output(sequence.request_id, index, delta)

    def _end_of_prompt(self, sequence: Sequence, state: Tensor) -> Output:
        """End a sequence that asked for its embedding or its scores, and for no token."""
        scores = self.scores.pop(sequence.request_id)
        self._leave(sequence)
        embedding = unit(state) if sequence.request.embed else ()
        cached = sequence.cached_tokens
        delta = Delta((), "stop", None, cached, embedding=embedding, scores=scores)
        return Output(sequence.request_id, 0, delta)

    def _finish(self, sequence: Sequence, token: int) -> tuple[Finish | None, str | None]:
        limits = sequence.request.limits
        produced = len(sequence.output)
        watcher = self._stops.get(sequence.request_id)
        matched = watcher.push(token, produced) if watcher is not None else None
        if produced >= limits.min_tokens:
            if matched is not None:
                return "stop", matched
            ends = token in self.eos_token_ids and not limits.ignore_eos
            if ends or token in limits.stop_token_ids:
                return "stop", None
        return ("length", None) if produced >= limits.max_tokens else (None, None)

    def _leave(self, sequence: Sequence, *, keep_pages: bool = False) -> None:
        """Take a sequence out of every queue; its pages are freed, or held for a hand-off."""
        request_id = sequence.request_id
        self.scheduler.remove(sequence)
        self.reserved.pop(request_id, None)
        self._stops.pop(request_id, None)
        self.scheduler.siblings.leave(sequence)
        self._matchers.pop(request_id, None)
        self.scores.pop(request_id)
        del self.sequences[request_id]
        if keep_pages:
            self.held[request_id] = sequence
        else:
            self.scheduler.release(sequence)


def movable_tokens(sequence: Sequence) -> int:
    """Leading tokens whose KV another replica could go on from. None of a prompt that is scored:
    what it has found out so far is not in the KV."""
    if sequence.table is None or sequence.request.score is not None:
        return 0
    return sequence.computed_tokens
