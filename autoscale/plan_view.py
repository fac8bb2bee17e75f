"""A plan for people: tables and sentences. Used by `sanderling plan`."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import Problem
from autoscale.plan_answers import Explanation

if TYPE_CHECKING:
    from autoscale.plan_command import Report

HOURS_PER_MONTH = 730
SHOWN_CHOICES = 12
SHOWN_BUCKETS = 12


def parts(report: "Report") -> Iterator[RenderableType]:
    """What is printed, top to bottom."""
    yield _headline(report)
    yield _purchases(report.plan, report.workload.problem)
    if report.plan.routing:
        yield _routing(report.plan, report.workload.problem)
    if report.plan.spans:
        yield _spans(report.plan)
    yield Text(_binds(report))
    yield Text(_check(report))
    yield _alternatives(report)
    yield Text(_sources(report))


def _headline(report: "Report") -> Text:
    plan, demand = report.plan, report.workload.problem.demand
    month = plan.usd_per_h * HOURS_PER_MONTH
    proved = (
        "proved best"
        if plan.gap <= 1e-6
        else f"bound {usd(plan.bound_usd_per_h)}, gap {plan.gap:.1%}"
    )
    text = Text(f"{usd(plan.usd_per_h)} $/h", style="bold")
    text.append(
        f" (about {month:,.0f} $ a month) for {demand.total_per_s:.4g} requests/s", "not bold"
    )
    text.append(f"; {proved}; {plan.solver}, {plan.solved_s:.2f} s", "not bold")
    return text


def usd(amount: float) -> str:
    """Cents, or three digits of what is less than a dollar."""
    return f"{amount:.2f}" if abs(amount) >= 1 or amount == 0 else f"{amount:.3g}"


def shape_words(shape: ReplicaShape) -> str:
    """`tensor 2, 8 bit, decode`, or `one accelerator`."""
    words = []
    if shape.tensor > 1:
        words.append(f"tensor {shape.tensor}")
    if shape.pipeline > 1:
        words.append(f"pipeline {shape.pipeline}")
    if shape.weight_bits != 16:
        words.append(f"{shape.weight_bits} bit")
    if shape.role != "mixed":
        words.append(shape.role)
    return ", ".join(words) or "one accelerator"


def _purchases(plan: Plan, problem: Problem) -> Table:
    offers = {offer.name: offer for offer in problem.catalog.offers(at_s=problem.at_s)}
    table = Table(title="Buy", title_justify="left")
    table.add_column("machines", justify="right")
    for name in ("offer", "where", "replicas"):
        table.add_column(name)
    table.add_column("$/h", justify="right")
    for purchase in plan.purchases:
        offer = offers[purchase.offer]
        quota = "" if offer.quota is None else f" of {offer.quota}"
        table.add_row(
            f"{purchase.machines}{quota}",
            f"{offer.name} ({offer.count} x {offer.kind})",
            f"{offer.zone}, {offer.market.replace('_', '-')}",
            f"{purchase.replicas} ({shape_words(purchase.shape)})",
            usd(purchase.usd_per_h),
        )
    return table


def _name(plan: Plan, place: int) -> str:
    """Of a purchase, told apart from others of its offer."""
    purchase: Purchase = plan.purchases[place]
    twins = [other for other in plan.purchases if other.offer == purchase.offer]
    return f"{purchase.offer} ({shape_words(purchase.shape)})" if len(twins) > 1 else purchase.offer


def _routing(plan: Plan, problem: Problem) -> Table:
    """The busiest buckets; the rest is in the JSON."""
    rates = problem.demand.requests_per_s
    shown = sorted(rates, key=lambda bucket: -rates[bucket])[:SHOWN_BUCKETS]
    left = len(rates) - len(shown)
    title = "Route" + (f" (the busiest {len(shown)} of {len(rates)} buckets)" if left else "")
    table = Table(title=title, title_justify="left")
    table.add_column("tokens in + out")
    table.add_column("requests/s", justify="right")
    table.add_column("to")
    for bucket in sorted(shown):
        shares = sorted(plan.routing.get(bucket, {}).items(), key=lambda each: -each[1])
        to = ", ".join(f"{_name(plan, at)} {share:.0%}" for at, share in shares if share > 5e-4)
        table.add_row(f"{bucket[0]} + {bucket[1]}", f"{rates[bucket]:.4g}", to)
    return table


def _spans(plan: Plan) -> Table:
    table = Table(title="Layers", title_justify="left")
    table.add_column("node")
    table.add_column("layers")
    table.add_column("tokens/s in", justify="right")
    for span in sorted(plan.spans, key=lambda span: (span.start, span.node)):
        tokens = sum(flow for (_, to), flow in plan.flow_tokens_per_s.items() if to == span.node)
        table.add_row(span.node, f"{span.start} to {span.stop - 1}", f"{tokens:.1f}")
    return table


def _binds(report: "Report") -> str:
    lines = [
        f"  {each.limit}: {each.changed} saves {usd(report.plan.usd_per_h - each.usd_per_h)} $/h"
        for each in report.bindings
    ]
    if report.plan.limits:
        lines.append(f"  the planner itself says: {', '.join(report.plan.limits)}")
    more = report.more
    dearer = more.usd_per_h - report.plan.usd_per_h
    lines.append(
        f"  {more.what}: " + (f"{usd(dearer)} $/h more" if more.plan else f"no plan ({more.why})")
    )
    head = "What binds" if report.bindings else "No limit binds: widened by a quarter, none saves"
    return "\n".join([head, *lines])


def _check(report: "Report") -> str:
    verdict = report.verdict
    if not verdict.feasible:
        faults = [f"  {fault.subject}: {fault.what}" for fault in verdict.faults]
        return "\n".join(["The check finds fault with this plan", *faults])
    said = ["Checked: offers, quotas, machines, cost, memory, routing, capacity"]
    if verdict.outcome:
        slo, outcome = report.workload.problem.demand.slo, verdict.outcome
        said.append(
            f"  simulated: {outcome.attained:.1%} of {outcome.requests} requests within the SLO "
            f"({slo.attained:.0%} asked); at that share first token {outcome.ttft_s:.3g} s, "
            f"gap {outcome.tpot_s:.3g} s"
        )
    said += [f"  not checked: {each}" for each in verdict.unchecked]
    return "\n".join(said)


def _alternatives(report: "Report") -> Table:
    table = Table(title="Instead", title_justify="left")
    table.add_column("with")
    table.add_column("$/h", justify="right")
    table.add_column("more", justify="right")
    table.add_column("machines")
    cost = report.plan.usd_per_h
    for other in report.alternatives:
        if other.plan is None:
            table.add_row(other.what, "-", "-", f"no plan: {other.why}")
            continue
        dearer = f"{other.usd_per_h / cost - 1:+.1%}" if cost else "-"
        held: dict[str, int] = {}
        for purchase in other.plan.purchases:
            held[purchase.offer] = held.get(purchase.offer, 0) + purchase.machines
        bought = ", ".join(f"{machines} {name}" for name, machines in held.items())
        table.add_row(other.what, usd(other.usd_per_h), dearer, bought)
    return table


def _sources(report: "Report") -> str:
    return "\n".join(["Where the numbers are from", *(f"  {s}" for s in sources(report))])


def sources(report: "Report") -> list[str]:
    """Of speeds, and of each kind and price that the plan rests on."""
    problem = report.workload.problem
    offers = {offer.name: offer for offer in problem.catalog.offers(at_s=problem.at_s)}
    bought = [offers[purchase.offer] for purchase in report.plan.purchases]
    found = [f"speed: {problem.profile.source}"]
    found += [f"planner: {each}" for each in report.plan.sources if each != problem.profile.source]
    found += [f"price of {o.name}: {o.usd_per_h:g} $/h, {o.source}" for o in bought]
    for name in dict.fromkeys(offer.kind for offer in bought):
        found.append(f"{name}: {problem.catalog.kind(name).source}")
    return list(dict.fromkeys(found))


def explanation_text(explanation: Explanation) -> RenderableType:
    """Sentences, and the table where there is one."""
    if not explanation.table:
        return Text("\n".join(explanation.sentences))
    table = Table(title="\n".join(explanation.sentences), title_justify="left")
    table.add_column("offer")
    table.add_column("shape")
    for name in ("requests/s", "$ for 1,000", "share"):
        table.add_column(name, justify="right")
    table.add_column("why not")
    for choice in explanation.table[:SHOWN_CHOICES]:
        cost = f"{choice.usd_per_1000:.3g}" if math.isfinite(choice.usd_per_1000) else "-"
        rate = f"{choice.requests_per_s:.3g}"
        words = shape_words(choice.shape)
        table.add_row(choice.offer, words, rate, cost, f"{choice.share:.0%}", choice.why)
    return table
