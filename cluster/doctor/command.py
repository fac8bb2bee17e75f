"""The command `sanderling doctor`: runs the checks, prints a table or JSON, exits 1 on failure."""

import dataclasses
import json
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.doctor import machine, packages
from cluster.doctor.finding import Finding
from cluster.options import Resolved, with_settings
from cluster.settings import Settings

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def checks(settings: Settings) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Every check with the words shown while it runs, cheapest first."""
    yield "Python", packages.python
    yield "compiler", machine.compiler
    yield "processor", machine.processor
    yield "port", lambda: machine.port(settings)
    yield "memory", lambda: machine.memory(settings)
    yield "shared memory", lambda: machine.shared_memory(settings)
    yield "packages", packages.requirements
    yield "package names", packages.names
    yield "model", lambda: packages.model(settings)
    yield "Ray (imports it)", packages.ray
    yield "GPU (imports torch)", machine.accelerator


def examine(settings: Settings, progress: Callable[[str], None]) -> list[Finding]:
    """All findings; `progress` is told what is being looked at."""
    findings = []
    for words, check in checks(settings):
        progress(words)
        findings.append(check())
    return findings


def table(findings: list[Finding]) -> Table:
    """Findings as people read them."""
    drawn = Table(box=None, pad_edge=False)
    for column in ("check", "", "found", "what to do"):
        drawn.add_column(column, overflow="fold")
    for finding in findings:
        state = Text(finding.state, STYLES[finding.state])
        drawn.add_row(finding.check, state, Text(finding.found), Text(finding.todo))
    return drawn


@click.command()
@with_settings("model", "port")
@click.option("--json", "as_json", is_flag=True, help="Print findings as JSON.")
@click.pass_context
def doctor(ctx: click.Context, resolved: Resolved, as_json: bool) -> None:
    """Check this machine against the settings and say what to do."""
    notes = Console(stderr=True)
    with notes.status("looking") as status:
        findings = examine(resolved.settings, lambda words: status.update(f"looking: {words}"))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        Console().print(table(findings))
    if any(finding.state == "fail" for finding in findings):
        ctx.exit(1)
