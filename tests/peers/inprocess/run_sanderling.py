"""`python -m tests.peers.inprocess.run_sanderling accurate|fast [together]`: our engine as a
process to measure, in two ways; together: with engine.batch_invariant = false. Called by
tests/peers/inprocess/contenders.py.

step: the model alone, as llama.cpp's benchmarks do it. A decode step is timed from its batch of
token ids to the largest logit of each row, which is the next id; the prompts' keys and values lie
there already. A prefill is one call, from 512 ids to the first token.
engine: what a replica runs, scheduler, pages, greedy sampler and log-probabilities of nothing; the
prompts are computed by it, and a decode is timed while all sequences are in the batch.
"""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from cluster.settings import Settings
from models.batch import TokenBatch
from serve import build
from serve.engine.engine import Engine
from serve.engine.runner import ModelRunner
from serve.engine.sequence import Limits, Request, Sampling
from serve.engine.sequence import Sequence as EngineSequence
from serve.kv.prefix import CacheKey
from tests.peers.inprocess.protocol import THREADS, Cell, Measure, serve, stepped

STEP_TOKENS = 1024


def settings(activations: str, *, together: bool = False) -> Settings:
    """The default model over the CPU kernels; else only a step's size differs from the defaults,
    so that it may hold a whole prompt, as every peer's does."""
    engine = {
        "kernels": "cpu",
        "activations": activations,
        "batch_invariant": not together,
        "budget_tokens": STEP_TOKENS,
    }
    return Settings.model_validate({"engine": engine})


class Bare:
    """The model's steps over the pages of an engine that has no sequences."""

    def __init__(self, runner: ModelRunner, page_tokens: int) -> None:
        self._decoder = runner.decoder
        self._kv = runner.storage.tensor
        self._page_tokens = page_tokens

    def rate(self, cell: Cell) -> float:
        """Tokens per second, see the module."""
        with torch.inference_mode():
            prompts = torch.tensor(cell.prompts())
            if not cell.new_tokens:
                started_s = time.perf_counter()
                self._step(prompts, 0, cell)
                return prompts.numel() / (time.perf_counter() - started_s)
            for number in range(cell.batch):  # one by one: their lengths are no decode's shape
                ids = self._step(prompts[number : number + 1], 0, cell, number)
            ids = ids.repeat(cell.batch)[:, None]
            started_s = time.perf_counter()
            for place in range(cell.new_tokens):
                ids = self._step(ids, cell.prompt_tokens + place, cell).reshape(-1, 1)
            return cell.batch * cell.new_tokens / (time.perf_counter() - started_s)

    def _step(self, ids: torch.Tensor, start: int, cell: Cell, first: int = 0) -> torch.Tensor:
        """The next ids [S] of ids [S, T] at positions start.., sequences counted from `first`."""
        sequences, tokens = ids.shape
        pages = -(-(cell.prompt_tokens + cell.new_tokens) // self._page_tokens)
        own = torch.arange(first, first + sequences)[:, None]
        places = torch.arange(start, start + tokens)[None]
        batch = TokenBatch(
            ids=ids.reshape(-1),
            positions=places.repeat(sequences, 1).reshape(-1),
            slots=(own * pages * self._page_tokens + places).reshape(-1),
            query_starts=tuple(range(0, sequences * tokens + 1, tokens)),
            context_tokens=(start + tokens,) * sequences,
            page_tables=own * pages + torch.arange(pages)[None],
            logit_rows=torch.arange(1, sequences + 1) * tokens - 1,
        )
        logits: torch.Tensor = self._decoder(batch, self._kv)
        # As the sampler does it: torch's own would wake its team of threads, which then spins
        # beside the next step.
        return torch.from_numpy(logits.numpy().argmax(axis=1))


class Whole:
    """The engine's own loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names = itertools.count()

    def rate(self, cell: Cell) -> float:
        """Tokens per second, see the module."""
        places = {name: place for place, name in enumerate(self._queue(cell))}

        def step(counts: list[int]) -> bool:
            if not self._engine.has_work:
                return False
            for output in self._engine.step():
                counts[places[output.request_id]] += 1
            return True

        return stepped(cell, step)

    def _queue(self, cell: Cell) -> Iterator[str]:
        for prompt in cell.prompts():
            name = f"{next(self._names)}"
            limits = Limits(max(cell.new_tokens, 1), ignore_eos=True)
            key = CacheKey(name, "", "")  # nobody shares a prefix
            request = Request(name, tuple(prompt), Sampling(temperature=0.0), limits, key)
            self._engine.add(EngineSequence(request))
            yield name


def load(activations: str, *, together: bool) -> tuple[str, Measure]:
    """The model once, under both."""
    torch.set_num_threads(THREADS)
    chosen = settings(activations, together=together)
    model = build.load(chosen)
    engine, _ = build.engine(chosen, model, None)
    assert isinstance(engine.runner, ModelRunner), "measured on the CPU"
    bare = Bare(engine.runner, chosen.engine.page_tokens)
    whole = Whole(engine)

    def measure(cell: Cell) -> dict[str, float]:
        # `bare` writes over whatever prefixes the engine keeps; nobody has their keys.
        return {"step": bare.rate(cell), "engine": whole.rate(cell)}

    return "this tree", measure


def main(arguments: Sequence[str]) -> None:
    activations, *others = arguments
    assert others in ([], ["together"]), others
    serve(lambda: load(activations, together=bool(others)))


if __name__ == "__main__":
    main(sys.argv[1:])
