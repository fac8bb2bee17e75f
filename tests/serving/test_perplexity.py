"""Perplexity through the engine against the model's own log-softmax, and what a loss says."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from serve.eval_command import evaluate, help_topics
from serve.perplexity import Scored, integer_decoder, loss, score, score_integer, windows
from tests.models.tiny import write_byte_level
from tests.serving.tiny import logits_of, settings

TEXT = [(7 * n * n + 3 * n) % 256 for n in range(90)]


def test_perplexity_is_that_of_the_model_s_own_logits(model):
    cut = windows(TEXT, 2, 40)  # longer than the budget of a step: scored in chunks
    made = score(settings(), model, cut)
    nats, likeliest = [], []
    for text in cut:
        for place in range(1, len(text)):
            logprobs = logits_of(model.decoder, list(text[:place]))[0].double().log_softmax(0)
            nats.append(-float(logprobs[text[place]]))
            likeliest.append(int(logprobs.argmax()))
    assert len(made.logprobs) == 2 * 39
    assert made.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)
    assert list(made.likeliest) == likeliest


def test_a_loss_is_of_the_one_against_the_other():
    better = Scored((-1.0, -1.0, -1.0, -1.0), (1, 2, 3, 4))
    worse = Scored((-1.5, -1.5, -1.0, -2.0), (1, 2, 3, 5))
    assert loss(better, better) == (loss(worse, worse)) != loss(worse, better)
    assert loss(worse, better).ratio == pytest.approx(math.exp(0.5))
    assert loss(worse, better).agreement == 0.75


def test_windows_and_a_text_that_is_too_short():
    assert windows([1, 2, 3, 4, 5], 2, 2) == [(1, 2), (3, 4)]
    with pytest.raises(ValueError, match="has 5 tokens; 3 windows of 2 need 6"):
        windows([1, 2, 3, 4, 5], 3, 2)


def test_the_command_compares_with_the_reference():
    assert len(help_topics()) > 100_000
    flags = ["ppl", "--windows", "1", "--window-tokens", "48", "--reference", "--json"]
    done = CliRunner().invoke(evaluate, [*flags, "--set", "engine.kernels=cpu"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["kernels"] == "cpu" and report["tokens"] == 47
    assert report["ratio"] == pytest.approx(1, abs=3e-3)
    assert report["ratio"] == pytest.approx(report["perplexity"] / report["reference_perplexity"])
    assert report["agreement"] > 0.95


def test_the_integer_decoder_is_scored_as_the_engine_is(model):
    cut = windows(TEXT, 2, 40)
    decoder = integer_decoder(model, help_topics()[:2000])
    made = score_integer(decoder, cut)
    logits = decoder(torch.tensor([cut[1]]))[0][0, :-1].double() * 2.0**-decoder.logit_point
    chosen = torch.tensor(cut[1][1:])
    assert made.logprobs[39:] == pytest.approx(-F.cross_entropy(logits, chosen, reduction="none"))
    assert list(made.likeliest[39:]) == logits.argmax(-1).tolist()
    lost = loss(made, score(settings(), model, cut))
    assert lost.ratio == pytest.approx(1, abs=0.05) and lost.agreement > 0.8


def test_the_command_measures_the_integer_decoder(tmp_path: Path):
    path = write_byte_level(tmp_path / "tiny.gguf")
    flags = ["ppl", "--windows", "2", "--window-tokens", "20", "--integer", "--json"]
    done = CliRunner().invoke(evaluate, [*flags, "--set", f"model={path}"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["kernels"] == "integer" and report["tokens"] == 38
    assert report["ratio"] == pytest.approx(report["perplexity"] / report["reference_perplexity"])
    assert report["ratio"] != 1
