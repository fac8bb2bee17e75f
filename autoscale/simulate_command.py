"""The command `simulate`: policies, or the whole control loop, over a recorded or made spot market.

Imported by the CLI when it is called; imports neither Ray nor torch.
"""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from autoscale.simulate.plot import draw, refuse_without_library
from autoscale.simulate.replay import Logged

if TYPE_CHECKING:
    from autoscale.simulate.market import Market
    from autoscale.simulate.replay import Report
    from autoscale.simulate.study import Study

COUNT = click.IntRange(min=1)
PRICE = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(min=0, max=1, min_open=True, max_open=True)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
CURVE = (3.0, 12.0, 25.0, 50.0, 100.0, 200.0)


@click.command("simulate")
@click.option(
    "--trace", type=FOLDER, help="Folder of zones in spot-traces' format. [default: made up]"
)
@click.option("--policy", default="mixed", show_default=True, help="Whose log and course to show.")
@click.option("--need", type=COUNT, default=4, show_default=True, help="Replicas that must answer.")
@click.option(
    "--target", type=SHARE, default=0.99, show_default=True, help="Share of time they do."
)
@click.option(
    "--over", type=click.IntRange(min=0), default=2, show_default=True, help="SpotHedge's."
)
@click.option(
    "--fit", "fit_share", type=SHARE, default=0.4, show_default=True, help="Share to learn from."
)
@click.option(
    "--spot-usd", type=PRICE, default=0.918, show_default=True, help="Per machine and hour."
)
@click.option("--on-demand-usd", type=PRICE, default=3.06, show_default=True, help="Likewise.")
@click.option("--startup-s", type=PRICE, default=180.0, show_default=True, help="Until it answers.")
@click.option(
    "--depth", type=COUNT, default=64, show_default=True, help="Of zones recorded as 0 or 1."
)
@click.option("--days", type=COUNT, default=7, show_default=True, help="Of a made-up market.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of a made-up market.")
@click.option("--log", type=FILE, help="Each action with its reason: CSV, with --loop JSON lines.")
@click.option("--plot", type=FILE, help="Draw curves and course to this PNG.")
@click.option("--loop", is_flag=True, help="Run the control loop over requests and market.")
@click.option("--requests", type=COUNT, default=100_000, show_default=True, help="For --loop.")
@click.option("--cap", type=COUNT, default=32, show_default=True, help="Most machines of --loop.")
@click.option("--period-s", type=PRICE, default=60.0, show_default=True, help="Of --loop's steps.")
@click.option(
    "--notice-s",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    help="How long ahead a machine of --loop is told to go.",
)
def simulate(
    trace: Path | None, policy: str, need: int, target: float, over: int, fit_share: float,
    spot_usd: float, on_demand_usd: float, startup_s: float, depth: int, days: int, seed: int,
    log: Path | None, plot: Path | None, loop: bool, requests: int, cap: int, period_s: float,
    notice_s: float,
) -> None:  # fmt: skip
    """Run spot policies over a market, or with --loop the control loop over requests as well: learn
    from its first part, score on the rest."""
    from autoscale.simulate.bound import bound
    from autoscale.simulate.study import POLICIES, Study

    if policy not in POLICIES:
        raise ValueError(f"--policy {policy!r} is not known; known are {', '.join(POLICIES)}")
    if plot:
        refuse_without_library()
    market = _market(trace, (spot_usd, on_demand_usd, startup_s), depth, days * 288, seed)
    if loop:
        from autoscale.simulate_loop import LoopRun, run_loop

        asked = LoopRun(policy, over, fit_share, requests, cap, period_s, notice_s, seed)
        run_loop(market, asked, log, plot)
        return
    study = Study(market, need, int(fit_share * market.steps))
    reports = run_all(study, target, over)
    least = bound(market.part(study.fitted, market.steps), need)
    console = Console(width=110, highlight=False)
    console.print(table(reports, least, target))
    shown = reports[policy]
    if log:
        write_log(shown, log)
        console.print(f"{len(shown.log)} actions in {log}")
    if plot:
        draw(curves(study, reports), shown, least, plot)
        console.print(f"drawn to {plot}")


def _market(
    trace: Path | None, terms: tuple[float, float, float], depth: int, steps: int, seed: int
) -> "Market":
    """The recorded one, or one made up. terms: spot and on-demand price, seconds to start."""
    from autoscale.simulate.market import made_market, read_market

    spot_usd_per_h, on_demand_usd_per_h, startup_s = terms
    if trace:
        return read_market(
            trace,
            spot_usd_per_h=spot_usd_per_h,
            on_demand_usd_per_h=on_demand_usd_per_h,
            startup_s=startup_s,
            depth=depth,
        )
    return made_market(
        steps,
        ("east-1a", "east-1b", "east-2a", "west-1a"),
        depth=depth,
        seed=seed,
        startup_s=startup_s,
        spot_usd_per_h=spot_usd_per_h,
        on_demand_usd_per_h=on_demand_usd_per_h,
    )


def run_all(study: "Study", target: float, over: int) -> "dict[str, Report]":
    """Each policy by its name, logged."""
    ours = study.calibrated(target)
    return {
        "mixed": study.mixed(ours, log=True),
        "spothedge": study.hedge(over, log=True),
        "even_spread": study.even(log=True),
        "single": study.single(_steadiest(study), log=True),
        "on_demand": study.on_demand(log=True),
    }


def _steadiest(study: "Study") -> str:
    """The pool that would have answered most over the fitted part."""
    enough = (study.market.capacity[: study.fitted] >= study.need).mean(0)
    return study.market.spot[int(enough.argmax())].name


def curves(study: "Study", reports: "dict[str, Report]") -> "dict[str, list[Report]]":
    """Policies with a knob as lines, the others as points."""
    from autoscale.spot.mixed import MixedPolicy

    return {
        "mixed (ours)": [study.mixed(MixedPolicy(price)) for price in CURVE],
        "SpotHedge, 0 to 4 over": [study.hedge(over) for over in range(5)],
        **{name: [reports[name]] for name in ("even_spread", "single", "on_demand")},
    }


def table(reports: "dict[str, Report]", least: float, target: float) -> Table:
    """One row for each policy, and the bound."""
    made = Table(title=f"scored part; ours calibrated for {target:.3%} on the fitted part")
    made.add_column("policy")
    for name in (
        "enough answer",
        "missing",
        "cost",
        "of it spot",
        "launches",
        "refused",
        "preempted",
    ):
        made.add_column(name, justify="right")
    for name, report in reports.items():
        spot = report.spot_usd / (report.spot_usd + report.on_demand_usd)
        made.add_row(
            name,
            f"{report.availability:.3%}",
            f"{report.missing_share:.3%}",
            f"{report.cost:.3f}",
            f"{spot:.0%}",
            str(report.launches),
            str(report.refused),
            str(report.preempted),
        )
    made.add_row("all-knowing", "100.000%", "0.000%", f"{least:.3f}", "", "", "", "")
    made.caption = (
        "enough answer: share of steps; missing: share of replicas; cost: of all on demand"
    )
    return made


def write_log(report: "Report", path: Path) -> None:
    """Every action with its time and reason."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Logged._fields)
        writer.writerows(report.log)
