"""Rotary frequencies against transformers' formulas, and what a rotation must do."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kernels.reference.rope import inverse_frequencies, rotate, rotation
from kernels.rope import RopeConfig

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
CASES: list[tuple[RopeConfig, dict[str, Any]]] = [
    (RopeConfig(theta=5e5), {"rope_type": "default"}),
    (RopeConfig(theta=5e5, kind="linear", factor=3.0), {"rope_type": "linear", "factor": 3.0}),
    (
        RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_context_tokens=512),
        {"rope_type": "llama3", **LLAMA3},
    ),
    (
        RopeConfig(theta=5e5, kind="yarn", factor=4.0, original_context_tokens=512),
        {"rope_type": "yarn", **YARN},
    ),
    (
        RopeConfig(
            theta=5e5,
            kind="yarn",
            factor=4.0,
            original_context_tokens=512,
            attention_factor=0.7,
            truncate=False,
        ),
        {"rope_type": "yarn", **YARN, "attention_factor": 0.7, "truncate": False},
    ),
]


def transformers_config(parameters: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 5e5, **parameters},
    )


@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=lambda case: str(case)[:40])
def test_frequencies_equal_transformers(ours: RopeConfig, theirs: dict[str, Any]):
    config = transformers_config(theirs)
    if theirs["rope_type"] == "default":
        inverse, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inverse, scale = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config)
    found = inverse_frequencies(ours, 64)
    torch.testing.assert_close(found.inverse, inverse, rtol=1e-6, atol=0)
    assert found.scale == pytest.approx(scale)


def test_factors_divide_each_frequency():
    factors = tuple(float(1 + index) for index in range(32))
    plain = inverse_frequencies(RopeConfig(), 64).inverse
    found = inverse_frequencies(RopeConfig(kind="factors", factors=factors), 64).inverse
    torch.testing.assert_close(found * torch.tensor(factors), plain)
    with pytest.raises(ValueError, match="got 32, accepted are 16"):
        inverse_frequencies(RopeConfig(kind="factors", factors=factors), 32)


def test_rotation_bits_equal_transformers():
    config = transformers_config({"rope_type": "default"})
    x, positions = torch.randn(50, 3, 64), torch.randint(0, 2048, (50,))
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    wanted, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    by = rotation(inverse_frequencies(RopeConfig(theta=5e5), 64), positions, torch.float32)
    assert torch.equal(rotate(x, by), wanted[0].transpose(0, 1))


def test_only_distance_matters():
    frequencies = inverse_frequencies(RopeConfig(), 64)
    query, key = torch.randn(1, 1, 64).double(), torch.randn(1, 1, 64).double()

    def score(query_position: int, key_position: int) -> float:
        def turned(x: torch.Tensor, position: int) -> torch.Tensor:
            return rotate(x, rotation(frequencies, torch.tensor([position]), torch.float64))

        return (turned(query, query_position) * turned(key, key_position)).sum().item()

    assert score(40, 10) == pytest.approx(score(130, 100), rel=1e-4)
    assert score(40, 10) != pytest.approx(score(40, 30), rel=1e-2)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"kind": "spiral"}, "llama3"),
        ({"theta": -1.0}, "positive"),
        ({"theta": float("nan")}, "finite"),
        ({"kind": "yarn"}, "original_context_tokens"),
        ({"kind": "factors"}, "one factor per frequency"),
    ],
)
def test_wrong_numbers_are_refused(wrong: dict[str, Any], word: str):
    with pytest.raises(ValueError, match=word):
        RopeConfig(**wrong)
