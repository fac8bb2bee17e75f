"""Proof rows of what the CPU kernels cost in quality: perplexity on two texts, of smaller KV caches
too, beside llama.cpp's on the same file, and what users are told of it; and how long greedy answers
stay those of the float32 reference, with transformers in bfloat16 as the measure. together: with
engine.batch_invariant = false."""

import argparse
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from cluster.settings import Settings
from cluster.settings.losses import MEASURED, TEXTS
from models.resolve import resolve
from serve import build
from serve.eval_command import help_topics
from serve.perplexity import Loss, Scored, Windows, loss, score, windows
from tests.models.oracle import reference
from tests.peers.perplexity import llama_perplexity, second_halves
from tests.prove.models import PROMPTS, TOKENS, generate, some_prompts
from tests.prove.row import Row

WINDOWS, WINDOW_TOKENS = 4, 512
MOST_RATIO = {"accurate": 1.003, "fast": 1.02}
MOST_KV_RATIO = {"float16": 1.001, "int8": 1.005, "int4": 1.03}
# Of llama.cpp's, which rounds activations to 8 bits as fast does.
MOST_OF_PEER = 1.0
MOST_UNTOLD = 0.002  # of a ratio, between what is measured and what users are told


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured; about five minutes."""
    exact = Settings.model_validate({"engine": {"kernels": "reference"}})
    model = build.load(exact)
    texts = {"Python's help": help_topics(), "Python's argparse": inspect.getsource(argparse)}
    encode = model.text.tokenizer.encode
    cut = {name: windows(encode(text), WINDOWS, WINDOW_TOKENS) for name, text in texts.items()}
    against = {name: score(exact, model, each) for name, each in cut.items()}
    prompts = some_prompts(model)
    wanted = generate(exact, model, prompts)
    common: dict[str, float] = {}
    for activations in MOST_RATIO:
        settings = with_kernels(activations)
        packed = build.load(settings)
        for name, each in cut.items():
            yield perplexity(settings, packed, name, each, against[name])
        if activations == "fast":
            served = with_kernels(activations, "float16")
            for name, text in texts.items():
                yield beside_llama(served, packed, name, text)
        common[activations] = common_prefix(generate(settings, packed, prompts), wanted)
        if activations == "accurate":
            for kv_dtype in MOST_KV_RATIO:
                small = with_kernels(activations, kv_dtype)
                for name, each in cut.items():
                    yield kv_perplexity(small, packed, name, each, against[name])
    for activations in MOST_RATIO:
        settings = with_kernels(activations, batch_invariant=False)
        packed = build.load(settings)
        for name, each in cut.items():
            yield perplexity(settings, packed, name, each, against[name])
        made = generate(settings, packed, prompts)
        common[f"{activations} together"] = common_prefix(made, wanted)
    yield from told(cut, against)
    yield from prefixes(common, common_prefix(bfloat16(exact, prompts), wanted))


def with_kernels(
    activations: str, kv_dtype: str = "float32", *, batch_invariant: bool = True
) -> Settings:
    """The default settings over the CPU kernels."""
    engine: dict[str, object] = {"kernels": "cpu", "activations": activations}
    engine |= {"kv_dtype": kv_dtype, "batch_invariant": batch_invariant}
    return Settings.model_validate({"engine": engine})


def perplexity(
    settings: Settings, model: build.Model, name: str, cut: Windows, against: Scored
) -> Row:
    """Against the float32 reference on the same windows."""
    activations = settings.engine.activations
    mode = activations if settings.engine.batch_invariant else f"{activations} together"
    lost = loss(score(settings, model, cut), against)
    return lost_row(f"perplexity, {mode}: {name}", lost, against, MOST_RATIO[activations])


def kv_perplexity(
    settings: Settings, model: build.Model, name: str, cut: Windows, against: Scored
) -> Row:
    """Of a smaller KV cache, against the float32 reference too."""
    kv_dtype = settings.engine.kv_dtype
    lost = loss(score(settings, model, cut), against)
    title = f"perplexity, accurate, KV in {kv_dtype}: {name}"
    return lost_row(title, lost, against, MOST_KV_RATIO[kv_dtype])


def beside_llama(settings: Settings, model: build.Model, name: str, text: str) -> Row:
    """fast, as it is served, and llama.cpp's own program on the same file, windows and tokens."""
    cut = windows(model.text.tokenizer.encode(text), WINDOWS, WINDOW_TOKENS)
    scored = second_halves(score(settings, model, cut), WINDOWS, WINDOW_TOKENS)
    ours = scored.perplexity
    theirs = llama_perplexity(resolve(settings.model), text, WINDOWS, WINDOW_TOKENS)
    title = f"perplexity, fast, second halves of the windows: {name}"
    measured = f"{ours:.4f}; llama.cpp {theirs:.4f}: x {ours / theirs:.4f}"
    return Row(
        title, f"<= x {MOST_OF_PEER} of llama.cpp's", measured, ours <= MOST_OF_PEER * theirs
    )


def told(cut: dict[str, Windows], against: dict[str, Scored]) -> Iterator[Row]:
    """Every figure that is said where a lossy setting is chosen, measured again."""
    for chosen, figures in MEASURED[Settings().model].items():
        settings = with_kernels(*chosen)
        model = build.load(settings)
        ratios = [loss(score(settings, model, cut[name]), against[name]).ratio for name in TEXTS]
        off = max(abs(a - b) for a, b in zip(ratios, figures, strict=True))
        measured = ", ".join(f"x {ratio:.4f}" for ratio in ratios)
        title = f"what users are told of {chosen.activations} with KV in {chosen.kv_dtype}"
        said = " and ".join(f"x {figure:.4f}" for figure in figures)
        yield Row(title, f"{said}, within {MOST_UNTOLD}", measured, off <= MOST_UNTOLD)


def lost_row(title: str, lost: Loss, against: Scored, most: float) -> Row:
    """The row of one loss."""
    measured = f"x {lost.ratio:.4f} of {against.perplexity:.2f}, {lost.agreement:.1%} likeliest"
    return Row(title, f"<= x {most}", measured, lost.ratio <= most)


def common_prefix(made: list[list[int]], wanted: list[list[int]]) -> float:
    """Mean number of tokens before the first that differs."""
    lengths = [
        next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
        for ours, theirs in zip(made, wanted, strict=True)
    ]
    return sum(lengths) / len(lengths)


def prefixes(common: dict[str, float], of_bfloat16: float) -> Iterator[Row]:
    """accurate has to stay with float32 at least as long as bfloat16 does; fast is told."""
    name = f"greedy answers of {PROMPTS} prompts: tokens in common with float32, of {TOKENS}"
    target = f">= transformers bfloat16: {of_bfloat16:.1f}"
    accurate = common["accurate"]
    yield Row(f"{name}, accurate", target, f"{accurate:.1f}", accurate >= of_bfloat16)
    yield Row(f"{name}, fast", "told", f"{common['fast']:.1f}", True)
    for mode in ("accurate together", "fast together"):
        yield Row(f"{name}, {mode}", target, f"{common[mode]:.1f}", common[mode] >= of_bfloat16)


def bfloat16(settings: Settings, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Greedy answers of transformers, which do not end early either."""
    model: Any = reference(resolve(settings.model)).to(torch.bfloat16)
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        with torch.no_grad():
            ids = torch.tensor([prompt])
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        answers.append(made[0, len(prompt) :].tolist())
    return answers
