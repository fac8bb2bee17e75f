"""What lossy settings are said to cost: with figures where there are some, else how to get them."""

import tomllib

import pytest

from cluster.settings import Settings, resolve
from cluster.settings.losses import MEASURED, TEXTS, Lossy, quality_cost

DEFAULT = Settings().model


def chosen(model: str = DEFAULT, **engine: str | bool) -> Settings:
    return Settings.model_validate({"model": model, "engine": engine})


@pytest.mark.parametrize("kv_dtype", ["auto", "float32", "float16"])
@pytest.mark.parametrize("activations", ["accurate", "float32"])
def test_what_rounds_nothing_of_note_says_nothing(activations: str, kv_dtype: str):
    assert quality_cost(chosen(activations=activations, kv_dtype=kv_dtype)) == ""


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize("activations", ["accurate", "fast"])
def test_every_combination_is_measured_for_the_default_model(activations: str, kv_dtype: str):
    said = quality_cost(chosen(activations=activations, kv_dtype=kv_dtype))
    assert bool(said) == ((activations, kv_dtype) != ("accurate", "auto"))
    assert ("engine.activations = 'fast'" in said) == (activations == "fast")
    assert ("engine.kv_dtype" in said) == (kv_dtype != "auto")
    if said:
        kept = "float16" if kv_dtype == "auto" else kv_dtype
        ratios = MEASURED[DEFAULT][Lossy(activations, kept)]
        assert all(f"{ratio - 1:+.2%}" in said for ratio in ratios)
        assert all(text in said for text in TEXTS)
        # A figure that nobody measured, or that would be no small loss.
        assert all(0.99 < ratio < 1.05 for ratio in ratios)


def test_finer_keys_and_values_cost_less():
    int8, int4 = (MEASURED[DEFAULT][Lossy("accurate", kind)] for kind in ("int8", "int4"))
    assert all(a < b for a, b in zip(int8, int4, strict=True))


def test_steps_that_are_computed_together_lose_less_and_say_so():
    told = quality_cost(chosen(activations="fast", batch_invariant=False))
    assert "at most +0.19%" in told and "batch_invariant = false" in told
    assert "at most" not in quality_cost(chosen(activations="fast"))


def test_a_model_without_figures_is_told_how_to_measure():
    said = quality_cost(chosen("my.gguf", activations="fast", kv_dtype="int8"))
    assert "is not measured" in said and "%" not in said
    command = "sanderling eval ppl --reference --model my.gguf"
    assert f"{command} --set engine.activations=fast --set engine.kv_dtype=int8" in said


def test_a_dry_run_says_it_and_can_still_be_read():
    given = resolve(sets=["engine.kv_dtype=int4"], environ={})
    text = given.to_toml()
    assert quality_cost(given.settings) in text
    assert Settings.model_validate(tomllib.loads(text)) == given.settings
    assert "In quality" not in resolve(environ={}).to_toml()
