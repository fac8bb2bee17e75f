"""`sanderling plan LOG.jsonl --explain N`: one decision of a recorded control loop, with what it
saw, why it did what it did, and whether the same loop decides the same again."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoscale.loop.actions import Action, Decision, Launch, Serve, Warn
from autoscale.loop.record import Repeated, repeat_file
from autoscale.loop.signals import Signals


def explain_decision(path: Path, number: str | None) -> int:
    """Print it; the exit code: 1 where the log does not repeat. ValueError for a number that is
    none of the log's."""
    console = Console(width=110, highlight=False)
    if number is None:
        return _print_all(console, path)
    found, last, same = None, 0, True
    for one in repeat_file(path):
        last, same = one.step.decision.number, same and one.same
        if str(last) == number:
            found = one
            break
    if found is None:
        raise ValueError(
            f"--explain {number!r} is no decision of {path}; a number from 1 to {last} is accepted"
        )
    for part in _parts(found, same):
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return 0 if same else 1


def _print_all(console: Console, path: Path) -> int:
    """Every decision that did something, a line for each action."""
    different = []
    for one in repeat_file(path):
        decision = one.step.decision
        if not one.same:
            different.append(decision.number)
        for act in decision.actions:
            line = f"{decision.number:6} {decision.now_s:10.0f} s  {said(act)}"
            console.print(line, markup=False, soft_wrap=True)
    verdict = "the log decides itself again, byte for byte"
    if different:
        verdict = f"{len(different)} decisions differ when made again, the first is {different[0]}"
    console.print(verdict)
    return 1 if different else 0


def _parts(one: Repeated, same: bool) -> Iterator[Table | str]:
    signals, decision = one.step.signals, one.step.decision
    yield f"decision {decision.number} at {decision.now_s:.0f} s"
    yield needs_table(signals, decision)
    yield machines_table(signals)
    yield from _told(signals)
    yield "\n".join(said(act) for act in decision.actions) or "nothing is done"
    yield (
        "made again, it and all before it are the same, byte for byte"
        if same
        else "made again, this decision or one before it is a different one: the log or the loop "
        "has changed"
    )


def needs_table(signals: Signals, decision: Decision) -> Table:
    """One row for each role: what came, what is reckoned with, what must answer."""
    table = Table()
    for name in ("role", "tokens/s", "reckoned", "waiting", "a replica", "needed", "why"):
        table.add_column(name, justify="left" if name in ("role", "why") else "right")
    for role, need in decision.needs.items():
        load = signals.load.get(role)
        table.add_row(
            role,
            f"{need.tokens_per_s:.1f}",
            f"{need.forecast_tokens_per_s:.1f}",
            "unknown" if load is None else str(load.queued_tokens),
            f"{need.replica_tokens_per_s:.1f}",
            str(need.need),
            need.reason,
        )
    return table


def machines_table(signals: Signals) -> Table:
    """How many machines of each offer are in which phase, by role."""
    table = Table()
    phases = ("pending", "starting", "ready", "draining")
    for name in ("offer", "role", *phases, "doomed", "$/h each"):
        table.add_column(name, justify="left" if name in ("offer", "role") else "right")
    prices = {offer.name: f"{offer.usd_per_h:.3f}" for offer in signals.offers}
    kinds = dict.fromkeys((machine.offer, machine.role) for machine in signals.machines)
    for offer, role in kinds:
        mine = [m for m in signals.machines if (m.offer, m.role) == (offer, role)]
        counts = [str(sum(m.phase == phase for m in mine)) for phase in phases]
        doomed = str(sum(m.doomed_s is not None for m in mine))
        table.add_row(offer, role or "nobody's", *counts, doomed, prices.get(offer, "not on sale"))
    return table


def _told(signals: Signals) -> Iterable[str]:
    for answer in signals.answers:
        yield f"answer: {answer.offer} for {answer.token}: {answer.kind}"
    for event in signals.events:
        yield f"market: {event.kind} in {event.pool}, {event.value:g}"
    for claim in signals.training:
        yield (
            f"training: {claim.job} holds {len(claim.machines)} of {claim.wanted}, runs on "
            f"{claim.least}; one fewer costs it ${claim.shrink_usd:.4f}, one more is worth "
            f"${claim.value_usd_per_h:.2f}/h"
        )


def said(act: Action) -> str:
    """An action in a line."""
    match act:
        case Launch(offer=offer, role=role):
            subject = f"{offer} for {role}"
        case Serve(role=role, machines=machines):
            subject = f"{role} on {len(machines)}"
        case Warn(about=about):
            subject = about
        case _:
            subject = act.machine
    return f"{act.act} {subject}: {act.reason}"
