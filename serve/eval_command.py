"""The command `eval`: what a model, or a lossy setting of it, is worth.

Imported by the CLI when it is called.
"""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cluster.options import Resolved, with_settings
from cluster.settings import Settings

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
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@with_settings("model")
def ppl(
    resolved: Resolved,
    file: Path | None,
    count: int,
    window_tokens: int,
    reference: bool,
    as_json: bool,
) -> None:
    """Perplexity of the model as these settings serve it, and what they cost in quality."""
    text = help_topics() if file is None else file.read_text(encoding="utf-8")
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
    from serve.perplexity import loss, score, windows

    model = build.load(settings)
    cut = windows(model.text.tokenizer.encode(text), count, window_tokens)
    scored = score(settings, model, cut)
    report: dict[str, Any] = {
        "kernels": settings.engine.kernels,
        "activations": settings.engine.activations,
        "dtype": settings.engine.dtype,
        "kv_dtype": settings.engine.kv_dtype,
        "tokens": len(scored.logprobs),
        "perplexity": scored.perplexity,
    }
    if reference:
        plain = {"dtype": "float32", "kernels": "reference"}
        lossless = {"activations": "accurate", "kv_dtype": "float32"}
        engine = settings.engine.model_copy(update=plain | lossless)
        exact = settings.model_copy(update={"engine": engine})
        against = score(exact, build.load(exact), cut)
        lost = loss(scored, against)
        report |= {
            "reference_perplexity": against.perplexity,
            "ratio": lost.ratio,
            "agreement": lost.agreement,
        }
    return report


def table(report: dict[str, Any]) -> Table:
    """The report for the eye."""
    made = Table("figure", "value", box=None)
    for name, value in report.items():
        made.add_row(
            name.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value)
        )
    return made
