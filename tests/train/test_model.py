"""The model against transformers' Llama, and its gradient against differences."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import models.load
from kernels.rope import RopeConfig
from models.config import ModelConfig
from tests.train import tiny
from train.export import config_json, export
from train.model import Llama
from train.weights import Start, build_model, read_start


def config(**changes) -> ModelConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ff": 48,
        "vocab": 272,
        "context_tokens": 64,
        "rms_eps": 1e-5,
        "rope": RopeConfig(theta=500.0),
        "eos_token_ids": (256,),
    }
    return ModelConfig(**(values | changes))


def theirs(wanted: ModelConfig) -> LlamaForCausalLM:
    values = config_json(wanted, "float64")
    values.pop("architectures")
    return LlamaForCausalLM(LlamaConfig(**values)).double()


@pytest.mark.parametrize("changes", [{}, {"tied_head": True}, {"kv_heads": 4}, {"kv_heads": 1}])
def test_logits_and_gradients_are_transformers(changes):
    torch.manual_seed(1)
    wanted = config(**changes)
    peer, mine = theirs(wanted), Llama(wanted).double()
    mine.load_state_dict(peer.state_dict())
    tokens = torch.randint(0, 272, (3, 17))
    expected = peer(tokens[:, :-1]).logits
    torch.testing.assert_close(mine(tokens[:, :-1]), expected, rtol=0, atol=1e-5)
    loss = functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    (mine.loss(tokens) / (3 * 16)).backward()
    gradients = dict(mine.named_parameters())
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_that_of_differences():
    """Central differences in float64 along random directions."""
    torch.manual_seed(2)
    model = Llama(config(layers=1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() < 2))
    tokens = torch.randint(0, 272, (2, 9))
    model.loss(tokens).backward()
    for parameter in model.parameters():
        direction = torch.randn_like(parameter)
        assert parameter.grad is not None
        slope = float((parameter.grad * direction).sum())
        losses = []
        for sign in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign)
                losses.append(float(model.loss(tokens)))
                parameter.add_(direction, alpha=-sign)
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-6)


def test_without_rotary_positions_logits_differ(monkeypatch):
    """The mutation of what the comparison with transformers is about."""
    wanted = config()
    peer, mine = theirs(wanted), Llama(wanted).double()
    mine.load_state_dict(peer.state_dict())
    monkeypatch.setattr("train.model.rotate", lambda x, cos, sin: x)
    tokens = torch.randint(0, 272, (1, 16))
    assert (mine(tokens) - peer(tokens).logits).abs().max() > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_the_saved_folder_is_the_model_to_others(tied: bool, tmp_path: Path):
    """transformers and our own loader read it, and compute what was trained."""
    job = tiny.job(model={"tied_head": tied})
    start = read_start(job)
    model = build_model(job, start)
    weights = {name: p.detach().float() for name, p in model.named_parameters()}
    export(tmp_path, start, weights)
    tokens = torch.randint(0, 256, (2, 12))
    expected = model(tokens)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).double()
    torch.testing.assert_close(peer(tokens).logits, expected, rtol=0, atol=1e-5)
    assert (peer.lm_head.weight is peer.model.embed_tokens.weight) == tied
    decoder = models.load.load_model(str(tmp_path))
    assert decoder.config.tied_head == tied and decoder.config.eos_token_ids == (256,)
    loaded = models.load.load_text(str(tmp_path))
    assert loaded.chat_template is not None
    spelled = "Ebb & flow: 3 µm,\n\tå 潮"
    assert loaded.tokenizer.encode(spelled) == list(spelled.encode())
    assert loaded.tokenizer.decode(list(spelled.encode())) == spelled
    assert loaded.tokenizer.encode("a<|endoftext|>") == [97, 256]


def test_a_model_that_exists_goes_on_with_its_weights(tmp_path: Path):
    fresh = tiny.job()
    start = read_start(fresh)
    model = build_model(fresh, start)
    export(tmp_path / "m", start, {n: p.detach() for n, p in model.named_parameters()})
    job = tiny.job(model={"start_from": str(tmp_path / "m")})
    again = read_start(job)
    assert isinstance(again, Start) and again.text is not None
    assert again.encode("ebb") == [101, 98, 98] and again.end_id == 256
    found = dict(build_model(job, again).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
