"""What the lossy settings of the engine cost in quality, as far as it was measured.

Said where such a setting is chosen: by `sanderling up` and its --dry-run, `bench engine`,
/v1/models and the page. `make prove-kernels` measures these figures again and compares.
"""

from typing import NamedTuple

from cluster.settings.sections import EngineSettings, Settings

LOSSLESS_KV = ("auto", "float32", "float16")
TEXTS = ("Python's help", "Python's argparse")
HOW = "4 windows of 512 tokens of each text"


class Lossy(NamedTuple):
    """The settings that a figure is of. kv_dtype: "float16" for all that round no further."""

    activations: str
    kv_dtype: str


# Perplexity over that of the float32 reference, on each of TEXTS, by model. Measured with
# `sanderling eval ppl --reference --set engine.activations=.. --set engine.kv_dtype=..`, the second
# text by --text (Python 3.11's argparse.py).
MEASURED: dict[str, dict[Lossy, tuple[float, ...]]] = {
    "smollm2-135m-instruct": {
        Lossy("fast", "float16"): (1.0019, 1.0030),
        Lossy("accurate", "int8"): (0.9997, 1.0006),
        Lossy("accurate", "int4"): (1.0129, 1.0146),
        Lossy("fast", "int8"): (1.0020, 1.0032),
        Lossy("fast", "int4"): (1.0224, 1.0173),
    }
}


def lossy(engine: EngineSettings) -> Lossy | None:
    """What of these settings costs quality; None where nothing does."""
    kv_dtype = "float16" if engine.kv_dtype in LOSSLESS_KV else engine.kv_dtype
    chosen = Lossy("fast" if engine.activations == "fast" else "accurate", kv_dtype)
    return None if chosen == Lossy("accurate", "float16") else chosen


def quality_cost(settings: Settings) -> str:
    """One sentence of what the chosen settings cost this model, or how to find out; "" where they
    cost nothing."""
    chosen = lossy(settings.engine)
    if chosen is None:
        return ""
    named = []
    if chosen.activations == "fast":
        named.append("engine.activations = 'fast'")
    if chosen.kv_dtype != "float16":
        named.append(f"engine.kv_dtype = '{chosen.kv_dtype}'")
    measured = MEASURED.get(settings.model, {}).get(chosen)
    flags = " ".join(f"--set {each.replace(' ', '').replace(chr(39), '')}" for each in named)
    if measured is None:
        return (
            f"{' with '.join(named)}: what it costs {settings.model} in quality is not measured; "
            f"`sanderling eval ppl --reference --model {settings.model} {flags}` measures it"
        )
    costs = " and ".join(
        f"{ratio - 1:+.2%} ({text})" for ratio, text in zip(measured, TEXTS, strict=True)
    )
    if chosen.activations == "fast" and not settings.engine.batch_invariant:
        costs = f"at most {costs}, less in steps of many tokens (batch_invariant = false),"
    return (
        f"{' with '.join(named)}: perplexity {costs} over float32, {settings.model}, {HOW}; "
        f"`sanderling eval ppl --reference {flags}` measures it again"
    )
