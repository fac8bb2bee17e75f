"""Penalties and bias against transformers' processors and by hand; log-probabilities by numpy."""

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from serve.engine.adjust import adjusted
from serve.engine.logprobs import report
from serve.engine.sampler import Draw
from serve.engine.sequence import Limits, Request, Sampling, Sequence
from tests.engine.fakes import GREEDY, KEY, engine, logits_of, run, sequence

PROMPT, OUTPUT = (3, 5, 5, 17), [5, 9, 9, 9, 21]


def draw(**terms: object) -> Draw:
    sampling = Sampling(temperature=0.0, **terms)  # type: ignore[arg-type]
    return Draw(sampling, len(PROMPT) + len(OUTPUT), (), PROMPT, OUTPUT)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_transformers(penalty):
    logits = logits_of([1])[None]
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([[*PROMPT, *OUTPUT]]), logits.clone()
    )
    torch.testing.assert_close(adjusted(logits, [draw(repetition_penalty=penalty)]), wanted)


def test_logit_bias_is_transformers():
    logits = logits_of([1])[None]
    wanted = SequenceBiasLogitsProcessor([[[4], 2.5], [[9], -100.0]])(
        torch.tensor([[1]]), logits.clone()
    )
    bias = ((4, 2.5), (9, -100.0), (10**6, 1.0))
    torch.testing.assert_close(adjusted(logits, [draw(logit_bias=bias)]), wanted)


def test_presence_and_frequency_count_the_output_only():
    logits = logits_of([1])[None]
    found = adjusted(logits, [draw(presence_penalty=0.5, frequency_penalty=0.25)])
    wanted = logits.clone()
    for token, times in ((5, 1), (9, 3), (21, 1)):
        wanted[0, token] -= 0.5 + 0.25 * times
    torch.testing.assert_close(found, wanted)


def test_a_row_is_adjusted_alone_and_the_model_s_logits_are_left_as_they_are():
    logits = torch.stack([logits_of([1]), logits_of([2])])
    before = logits.clone()
    found = adjusted(logits, [draw(), draw(logit_bias=((0, 50.0),))])
    assert torch.equal(found[0], before[0]) and torch.equal(logits, before)
    assert not torch.equal(found[1], before[1])
    assert adjusted(logits, [draw(), draw()]) is logits


def numpy_logprobs(logits: torch.Tensor) -> np.ndarray:
    values = logits.double().numpy()
    shifted = values - values.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def test_logprobs_are_numpy_s():
    logits = torch.stack([logits_of([1]), logits_of([2]), logits_of([3])])
    found = report(logits, [4, 5, 6], [None, 0, 3])
    assert found[0] is None and found[1] is not None and found[2] is not None
    assert found[1].top == ()
    assert found[1].logprob == pytest.approx(numpy_logprobs(logits[1])[5], abs=1e-9)
    wanted = numpy_logprobs(logits[2])
    assert [token for token, _ in found[2].top] == np.argsort(-wanted)[:3].tolist()
    assert [p for _, p in found[2].top] == pytest.approx(np.sort(wanted)[::-1][:3], abs=1e-9)


def asking(request_id: str, **terms: object) -> Sequence:
    sampling = Sampling(temperature=0.0, **terms)  # type: ignore[arg-type]
    limits = Limits(30, ignore_eos=True)
    return Sequence(Request(request_id, (1, 2, 3), sampling, limits, KEY, logprobs=2))


def test_the_engine_reports_what_the_model_thought_whatever_was_done_to_the_logits():
    made = engine()
    asked = asking("a", frequency_penalty=1.0, logit_bias=((7, 3.0),))
    made.add(asked)
    seen = []
    while made.has_work:
        seen += made.step()
    tokens = [*asked.request.prompt]
    for output in seen:
        [token], [entry] = output.delta.token_ids, output.delta.logprobs
        wanted = numpy_logprobs(logits_of(tokens))
        assert entry.logprob == pytest.approx(wanted[token], abs=1e-6)
        assert entry.top[0][0] == int(wanted.argmax())
        tokens.append(token)
    assert len(seen) == 30


def test_penalties_keep_a_sequence_from_repeating_and_survive_a_move():
    def tokens_of(resumed_after: int) -> list[int]:
        asked = asking("a", presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=1.5)
        first = engine()
        first.add(asked)
        for _ in range(resumed_after):
            first.step()
        moved = Sequence.from_bytes(asked.to_bytes())
        second = engine()
        second.add(moved)
        while second.has_work:
            second.step()
        return moved.output

    undisturbed = tokens_of(0)
    assert [tokens_of(n) for n in (1, 5, 29)] == [undisturbed] * 3
    plain = sequence("p", (1, 2, 3), 30, sampling=GREEDY, ignore_eos=True)
    made = engine()
    made.add(plain)
    run(made)
    assert plain.output != undisturbed
