"""The command `plan`: what to buy for a workload, why, and what else there is.

Given the log of a control loop instead, it says what was decided and why. Imported by the CLI when
it is called. Exit codes: 0 a plan that its check confirms, 1 there is none
(or the check finds fault with it), 2 a mistake in the workload or the options.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from autoscale import plan_json, plan_view
from autoscale.placement.explain import Asker, Binding, Replan, alternatives, binding, more_demand
from autoscale.placement.feasible import Verdict, check
from autoscale.placement.plan import Plan
from autoscale.placement.planner import InfeasibleError, Planner
from autoscale.placement.registry import PLANNERS, planner
from autoscale.placement.workload import Workload, read_workload
from autoscale.plan_answers import Explanation, reader_of

FILE = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True)
class Report:
    """A plan with what was found out about it."""

    workload: Workload
    plan: Plan
    verdict: Verdict
    bindings: tuple[Binding, ...]
    alternatives: tuple[Replan, ...]
    more: Replan


@click.command()
@click.argument("workload", type=FILE)
@click.option("--planner", "name", metavar="NAME", help=f"One of {', '.join(PLANNERS.names())}.")
@click.option(
    "--explain",
    metavar="DECISION",
    help="An offer's name, or a bucket as 512x128; of a control loop's log, a decision's number.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--picture", type=FILE, help="Also draw the plan to this PNG.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the simulated arrivals.")
def plan(
    workload: Path,
    name: str | None,
    explain: str | None,
    as_json: bool,
    picture: Path | None,
    seed: int,
) -> None:
    """What to buy for the load in WORKLOAD (TOML), at what price, and what binds it. For the log of
    a control loop (.jsonl): what it did, and why."""
    if workload.suffix == ".jsonl":
        from autoscale.loop_view import explain_decision

        sys.exit(explain_decision(workload, explain))
    from autoscale.placement.picture import draw, refuse_without_library

    if picture is not None:
        refuse_without_library()
    read = read_workload(workload)
    chosen = planner(name or read.planner)
    answer = reader_of(explain, read.problem) if explain else None
    try:
        report = run(read, chosen, seed)
    except InfeasibleError as error:
        sys.exit(_say_infeasible(read, chosen, error, as_json))
    if picture is not None:
        draw(report.plan, read.problem, report.verdict, picture)
    asker = Asker(chosen, read.problem, read.deadline_s)
    explanation = answer(report.plan, asker) if answer else None
    if as_json:
        found = plan_json.as_json(report, explanation, plan_view.sources(report))
        click.echo(json.dumps(found, indent=1))
    else:
        _print(report, explanation)
    sys.exit(0 if report.verdict.feasible else 1)


def run(workload: Workload, chosen: Planner, seed: int = 0) -> Report:
    """Plan, check, and ask what would change the plan. InfeasibleError where there is none."""
    problem = workload.problem
    asker = Asker(chosen, problem, workload.deadline_s)
    made = chosen.plan(problem, deadline_s=workload.deadline_s)
    return Report(
        workload,
        made,
        check(made, problem, seed=seed),
        tuple(binding(asker, made)),
        tuple(alternatives(asker, made)),
        more_demand(asker),
    )


def _print(report: Report, explanation: Explanation | None) -> None:
    console = Console()
    for part in plan_view.parts(report):
        console.print(part)
    if explanation is not None:
        console.print()
        console.print(plan_view.explanation_text(explanation))


def _say_infeasible(
    workload: Workload, chosen: Planner, error: InfeasibleError, as_json: bool
) -> int:
    """Why there is no plan, and which limit would have to give way; the exit code."""
    asker = Asker(chosen, workload.problem, workload.deadline_s)
    ways = binding(asker, None)
    if as_json:
        ways_out = [
            {"limit": way.limit, "changed": way.changed, "usd_per_h": way.usd_per_h} for way in ways
        ]
        click.echo(json.dumps({"infeasible": str(error), "ways_out": ways_out}, indent=1))
        return 1
    click.echo(f"no plan: {error}", err=True)
    for way in ways:
        what = f"{way.limit}: {way.changed} would do"
        click.echo(f"  {what}, at {plan_view.usd(way.usd_per_h)} $/h", err=True)
    if not ways:
        click.echo("  no single limit, made wider by a quarter, makes one possible", err=True)
    return 1
