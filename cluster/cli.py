"""The command `sanderling`: finds each command by name and turns user errors into sentences.

Commands are strings until they are called, so that --help imports neither torch nor Ray. A
ValueError or a missing file is the user's: a sentence and exit code 2. Anything else is ours and
keeps its traceback.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from cluster.registry import load


class Entry(NamedTuple):
    """Where a command is and what it does in one line."""

    target: str
    summary: str


COMMANDS: Mapping[str, Entry] = {
    "up": Entry("serve.commands:up", "Start serving; returns when the first answer is there."),
    "down": Entry("serve.commands:down", "Stop what `up` started."),
    "status": Entry(
        "serve.commands:status", "Replicas, queues and KV pages of the running service."
    ),
    "bench": Entry("serve.bench_command:bench", "Measure the running service, or the engine."),
    "eval": Entry("serve.eval_command:evaluate", "Measure what a model or a setting is worth."),
    "compress": Entry(
        "serve.compress_command:compress", "Write a model with smaller weights, and compare."
    ),
    "scale": Entry("serve.scale_command:scale", "Change how many replicas run."),
    "drain": Entry("serve.drain_command:drain", "Take one replica out, its requests elsewhere."),
    "simulate": Entry(
        "autoscale.simulate_command:simulate", "Run spot policies over a recorded or made market."
    ),
    "autoscale": Entry(
        "autoscale.providers.controller_command:autoscale",
        "Run the control loop over a provider and a service.",
    ),
    "key": Entry("serve.key_command:key", "Make an API key for a tenant."),
    "plan": Entry("autoscale.plan_command:plan", "What to buy for a load, and where to put it."),
    "train": Entry("train.commands:train", "Train a model, or go on with one, by a job file."),
    "share": Entry(
        "autoscale.providers.share_command:share",
        "Serve and train on one machine; serving borrows from training while it is short.",
    ),
    "doctor": Entry("cluster.doctor.command:doctor", "Check this machine and say what to do."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = load(COMMANDS[cmd_name].target)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}; known: {', '.join(COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup)
@click.version_option(package_name="sanderling")
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
def cli(traceback: bool) -> None:
    """Serve language models on one machine or a Ray cluster, prefill and decode apart."""
    # --traceback is read by main(), which is where errors end.


def main(arguments: list[str] | None = None) -> Any:
    """Entry point. Exits 0, 1 (the command says no), or 2 (the user can mend it)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return cli.main(arguments, prog_name="sanderling")
    except (ValueError, FileNotFoundError, PermissionError) as error:
        if "--traceback" in arguments:
            raise
        click.echo(f"sanderling: {error}", err=True)
        sys.exit(2)
