"""The options that every command with settings shares, and the step from them to settings.

A command is decorated with `@with_settings(...)` and gets one `Resolved` as its first argument.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from cluster.settings import Resolved, resolve
from cluster.settings.catalog import KNOWN

NAMED: Mapping[str, str] = {"model": "model", "host": "http.host", "port": "http.port"}
"""Short flags and the settings they stand for."""

DEFAULT_FILE = Path("sanderling.toml")

Command = Callable[..., Any]


def with_settings(*flags: str, dry_run: bool = False) -> Callable[[Command], Command]:
    """Add -c/--config, --set and the named `flags`; call the command with a `Resolved` first.

    flags: names from NAMED. dry_run: also add --dry-run, which prints the resolved file and ends.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(config: Path | None, sets: tuple[str, ...], **rest: Any) -> Any:
            given = {NAMED[flag]: rest.pop(flag) for flag in flags}
            resolved = resolve(config or _default_file(), os.environ, sets, given)
            if dry_run and rest.pop("dry_run"):
                sys.stdout.write(resolved.to_toml())
                return None
            return command(resolved, **rest)

        return _decorated(run, flags, dry_run)

    return decorate


def _decorated(run: Command, flags: tuple[str, ...], dry_run: bool) -> Command:
    options = [
        click.option(
            "-c",
            "--config",
            type=click.Path(path_type=Path),
            help=f"Settings file (TOML). Default: {DEFAULT_FILE}, where it exists.",
        ),
        click.option(
            "--set", "sets", multiple=True, metavar="NAME=VALUE", help="One setting; repeatable."
        ),
    ]
    options += [
        click.option(f"--{flag}", metavar="VALUE", help=KNOWN[NAMED[flag]].description)
        for flag in flags
    ]
    if dry_run:
        options.append(
            click.option("--dry-run", is_flag=True, help="Print the resolved settings and end.")
        )
    for option in reversed(options):
        run = option(run)
    return run


def _default_file() -> Path | None:
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


__all__ = ["Resolved", "with_settings"]
