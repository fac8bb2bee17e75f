"""The command `eval`: what a model, or a lossy setting of it, is worth.

Imported by the CLI when it is called.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from cluster.options import Resolved, with_settings
from cluster.settings import Settings

if TYPE_CHECKING:
    from serve.perplexity import Scored

COUNT = click.IntRange(min=1)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.group("eval")
def evaluate() -> None:
    """Measure quality: `ppl` is perplexity on a text."""


@evaluate.command("ppl")
@click.option("--text", "file", type=FILE, help="UTF-8 text; Python's own help topics without one.")
@click.option("--windows", "count", type=COUNT, default=4, show_default=True, help="How many.")
@click.option(
    "--window-tokens",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens of a window, which knows nothing of the others.",
)
@click.option(
    "--reference", is_flag=True, help="Also measure engine.kernels = 'reference', and compare."
)
@click.option(
    "--integer",
    is_flag=True,
    help="Measure the integer-only decoder that is made of the model, and compare as --reference.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@with_settings("model")
def ppl(
    resolved: Resolved,
    file: Path | None,
    count: int,
    window_tokens: int,
    reference: bool,
    integer: bool,
    as_json: bool,
) -> None:
    """Perplexity of the model as these settings serve it, and what they cost in quality."""
    text = help_topics() if file is None else file.read_text(encoding="utf-8")
    if integer:
        report = measure_integer(resolved.settings, text, count, window_tokens)
    else:
        report = measure(resolved.settings, text, count, window_tokens, reference)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        Console().print(table(report))


def help_topics() -> str:
    """The text behind Python's help(): English prose and code, the same wherever Python 3.11 is."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def measure(
    settings: Settings, text: str, count: int, window_tokens: int, reference: bool
) -> dict[str, Any]:
    """Perplexity, tokens scored, and with `reference` what is lost against it."""
    from serve import build
    from serve.perplexity import score, windows

    model = build.load(settings)
    cut = windows(model.text.tokenizer.encode(text), count, window_tokens)
    scored = score(settings, model, cut)
    report: dict[str, Any] = {
        "kernels": build.kernels(model),
        "activations": settings.engine.activations,
        "batch_invariant": settings.engine.batch_invariant,
        "dtype": settings.engine.dtype,
        "kv_dtype": build.kv_format(settings, model),
        "tokens": len(scored.logprobs),
        "perplexity": scored.perplexity,
    }
    if reference:
        exact = exactly(settings)
        report |= compared(scored, score(exact, build.load(exact), cut))
    return report


def measure_integer(
    settings: Settings, text: str, count: int, window_tokens: int
) -> dict[str, Any]:
    """Perplexity of the integer-only decoder, and what is lost against float32; of the settings
    only the model counts. Its integers are fitted to the end of Python's help topics."""
    from serve import build
    from serve.perplexity import integer_decoder, score, score_integer, windows

    exact = exactly(settings)
    model = build.load(exact)
    cut = windows(model.text.tokenizer.encode(text), count, window_tokens)
    scored = score_integer(integer_decoder(model, help_topics()), cut)
    report = {
        "kernels": "integer",
        "tokens": len(scored.logprobs),
        "perplexity": scored.perplexity,
    }
    return report | compared(scored, score(exact, model, cut))


def exactly(settings: Settings) -> Settings:
    """The same model in float32 by the reference kernels."""
    plain = {"dtype": "float32", "kernels": "reference"}
    lossless = {"activations": "accurate", "batch_invariant": True, "kv_dtype": "auto"}
    engine = settings.engine.model_copy(update=plain | lossless)
    return settings.model_copy(update={"engine": engine})


def compared(scored: "Scored", against: "Scored") -> dict[str, float]:
    """What the first loses against the second."""
    from serve.perplexity import loss

    lost = loss(scored, against)
    return {
        "reference_perplexity": against.perplexity,
        "ratio": lost.ratio,
        "agreement": lost.agreement,
    }


def table(report: dict[str, Any]) -> Table:
    """The report for the eye."""
    made = Table("figure", "value", box=None)
    for name, value in report.items():
        made.add_row(
            name.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value)
        )
    return made
