"""The command `compress`: a model in a smaller format, and what that costs.

Imported by the CLI when it is called.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cluster.options import Resolved, with_settings
from cluster.settings import Settings
from serve.eval_command import COUNT, FILE, help_topics, measure

if TYPE_CHECKING:
    from models.save import Source

WINDOW_TOKENS = 512
KINDS = "f32, f16, bf16, q8_0, q5_0, q4_1 or q4_0"


@click.command()
@click.argument("model")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the new file; made where it is missing.",
)
@click.option("--weights", "kind", required=True, metavar="KIND", help=f"{KINDS}, ggml's formats.")
@click.option("--text", "file", type=FILE, help="UTF-8 text; Python's own help topics without one.")
@click.option("--windows", "count", type=COUNT, default=4, show_default=True, help="How many.")
@click.option(
    "--window-tokens",
    type=click.IntRange(min=2),
    help=f"Tokens of a window; {WINDOW_TOKENS}, or the model's context where that is shorter.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@with_settings()
def compress(
    resolved: Resolved,
    model: str,
    out: Path,
    kind: str,
    file: Path | None,
    count: int,
    window_tokens: int | None,
    as_json: bool,
) -> None:
    """Write MODEL (a .gguf file, a folder, a run, a name) with smaller weights, and compare.

    Perplexity is measured before and after, as these settings serve the model (`eval ppl`).
    """
    settings = resolved.settings.model_copy(update={"model": model})
    text = help_topics() if file is None else file.read_text(encoding="utf-8")
    report = compressed(settings, out, kind, text, count, window_tokens)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    console = Console()
    console.print(table(report))
    console.print(f"Serve it: sanderling up --model {report['after']['file']}", soft_wrap=True)


def compressed(
    settings: Settings, out: Path, kind: str, text: str, count: int, window_tokens: int | None
) -> dict[str, Any]:
    """Writes OUT/MODEL-KIND.gguf; what the model was before and is after. ValueError for a model
    that cannot be served or written so, and for a text that is too short."""
    from models.load import load_text
    from models.resolve import resolve
    from models.save import open_source, refuse, weight_format, write_gguf

    chosen = weight_format(kind)
    path = resolve(settings.model)
    source = open_source(path)
    name = path.name if path.is_dir() else path.stem
    target = out / f"{name}-{kind}.gguf"
    refuse(source, target, chosen)
    tokens = window_tokens or min(WINDOW_TOKENS, load_text(str(path)).config.context_tokens)
    before = _side(settings, path, text, count, tokens)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Writing", total=None)
        written = write_gguf(
            source,
            target,
            chosen,
            lambda done, of: progress.update(task, completed=done, total=of),
        )
    after = _side(settings, written.path, text, count, tokens)
    return {
        "before": before,
        "after": after,
        "bytes_ratio": after["bytes"] / before["bytes"],
        "perplexity_ratio": after["perplexity"] / before["perplexity"],
        "weights_error": written.error,
    }


def _side(settings: Settings, path: Path, text: str, count: int, tokens: int) -> dict[str, Any]:
    """A model's file, formats, size and perplexity."""
    from models.save import open_source

    source = open_source(path)
    facts = {"file": str(path), "weights": _forms(source), "bytes": source.bytes}
    chosen = settings.model_copy(update={"model": str(path)})
    return facts | measure(chosen, text, count, tokens, reference=False)


def _forms(source: "Source") -> str:
    """The formats of its matrices, the one with most values first."""
    counts: dict[str, int] = {}
    for tensor in source.tensors:
        if len(tensor.shape) == 2:
            rows, columns = tensor.shape
            counts[tensor.form] = counts.get(tensor.form, 0) + rows * columns
    return ", ".join(sorted(counts, key=lambda form: -counts[form]))


def table(report: dict[str, Any]) -> Table:
    """The report for the eye."""
    before, after = report["before"], report["after"]
    made = Table("", "before", "after", "after / before", box=None)
    made.add_row("weights", before["weights"], after["weights"], "")
    made.add_row("bytes", *(f"{s['bytes']:,}" for s in (before, after)), _share(report, "bytes"))
    perplexities = (f"{side['perplexity']:.4f}" for side in (before, after))
    made.add_row("perplexity", *perplexities, _share(report, "perplexity"))
    made.add_row("computed by", before["kernels"], after["kernels"], "")
    made.add_row("error of weights", "", f"{report['weights_error']:.3%}", "")
    made.caption = f"{after['tokens']} tokens scored"
    return made


def _share(report: dict[str, Any], name: str) -> str:
    return f"{report[f'{name}_ratio']:.4f}"
