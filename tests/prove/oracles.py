"""Proof rows against transformers in fp32: log-probabilities and embeddings of the default."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from cluster.settings import Settings
from models.resolve import resolve
from serve import build
from serve.engine.sequence import Output, Sequence
from tests.models.oracle import reference, reference_logits
from tests.prove.engine import sequence
from tests.prove.row import Row

TOLERANCE = 1e-3
PROMPTS = 12
TOKENS = 16


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured; in float32, as the oracle is."""
    settings = Settings.model_validate({"engine": {"kernels": "reference"}})
    model, oracle = build.load(settings), reference(resolve(settings.model))
    yield logprobs(settings, model, oracle)
    yield scores(settings, model, oracle)
    yield embeddings(settings, model, oracle)


def _run(settings: Settings, model: build.Model, asked: list[Sequence]) -> list[Output]:
    """All outputs of all sequences, batched together in one engine."""
    engine, storage = build.engine(settings, model, None)
    for one in asked:
        engine.add(one)
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    engine.check()
    storage.close()
    return outputs


def _asked(number: int, tokens: int, **terms: Any) -> Sequence:
    made = sequence(f"p{number}", 5 + 17 * number, tokens, offset=101 * number)
    return Sequence(replace(made.request, **terms))


def logprobs(settings: Settings, model: build.Model, oracle: Any) -> Row:
    """Of every chosen token and of the five likeliest, through chunks and batches."""
    asked = [_asked(n, TOKENS, logprobs=5) for n in range(PROMPTS)]
    outputs = _run(settings, model, asked)
    largest, count = 0.0, 0
    for one in asked:
        wanted = reference_logits(oracle, one.request.prompt, one.output).double().log_softmax(1)
        entries = [e for o in outputs if o.request_id == one.request_id for e in o.delta.logprobs]
        for row, token, entry in zip(wanted, one.output, entries, strict=True):
            reported = [(token, entry.logprob), *entry.top]
            largest = max(largest, *(abs(float(row[t]) - value) for t, value in reported))
            count += len(reported)
    name = f"{count} log-probabilities against transformers fp32"
    return Row(name, f"<= {TOLERANCE:g}", f"{largest:.1e}", count > 0 and largest <= TOLERANCE)


def scores(settings: Settings, model: build.Model, oracle: Any) -> Row:
    """Of the prompts' own tokens, as `echo` with `logprobs` reports them, twice: the second time
    the prompts are cached."""
    asked = [_asked(n % PROMPTS, 1, score=5) for n in range(2 * PROMPTS)]
    asked = [Sequence(replace(one.request, request_id=f"{n}")) for n, one in enumerate(asked)]
    outputs = {output.request_id: output.delta.scores for output in _run(settings, model, asked)}
    largest, count = 0.0, 0
    for one in asked:
        prompt = one.request.prompt
        wanted = reference_logits(oracle, prompt[:1], prompt[1:]).double().log_softmax(1)
        for row, token, entry in zip(wanted, prompt[1:], outputs[one.request_id], strict=True):
            reported = [(token, entry.logprob), *entry.top]
            largest = max(largest, *(abs(float(row[t]) - value) for t, value in reported))
            count += len(reported)
    name = f"{count} log-probabilities of prompts against transformers fp32"
    return Row(name, f"<= {TOLERANCE:g}", f"{largest:.1e}", count > 0 and largest <= TOLERANCE)


def embeddings(settings: Settings, model: build.Model, oracle: Any) -> Row:
    """The last state of each text, scaled to length 1."""
    asked = [_asked(n, 1, embed=True) for n in range(PROMPTS)]
    outputs = {output.request_id: output.delta.embedding for output in _run(settings, model, asked)}
    largest = 0.0
    for one in asked:
        ids = torch.tensor([one.request.prompt])
        with torch.no_grad():
            state = oracle.model(ids, use_cache=False).last_hidden_state[0, -1]
        difference = torch.tensor(outputs[one.request_id]) - state / state.norm()
        largest = max(largest, float(difference.abs().max()))
    name = f"embeddings of {PROMPTS} texts against transformers fp32"
    ok = len(outputs) == PROMPTS and largest <= TOLERANCE
    return Row(name, f"<= {TOLERANCE:g}", f"{largest:.1e}", ok)
