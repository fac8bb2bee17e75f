"""A plan, and all that was found out about it, for scripts. Used by `sanderling plan --json`."""

import math
from typing import TYPE_CHECKING, Any

from autoscale.placement.explain import Choice
from autoscale.placement.plan import Plan, ReplicaShape

if TYPE_CHECKING:
    from autoscale.plan_answers import Explanation
    from autoscale.plan_command import Report


def shape_json(shape: ReplicaShape) -> dict[str, Any]:
    return {
        "kind": shape.kind,
        "tensor": shape.tensor,
        "pipeline": shape.pipeline,
        "role": shape.role,
        "weight_bits": shape.weight_bits,
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan; the place in `purchases` names a purchase in `routing`."""
    return {
        "usd_per_h": plan.usd_per_h,
        "bound_usd_per_h": plan.bound_usd_per_h,
        "gap": plan.gap,
        "solver": plan.solver,
        "solved_s": plan.solved_s,
        "limits": list(plan.limits),
        "purchases": [
            {
                "offer": p.offer,
                "machines": p.machines,
                "replicas": p.replicas,
                "usd_per_h": p.usd_per_h,
                "shape": shape_json(p.shape),
            }
            for p in plan.purchases
        ],
        "routing": [
            {"bucket": list(bucket), "shares": {str(at): share for at, share in shares.items()}}
            for bucket, shares in plan.routing.items()
        ],
        "spans": [[span.node, span.start, span.stop] for span in plan.spans],
        "flow_tokens_per_s": [[*edge, flow] for edge, flow in plan.flow_tokens_per_s.items()],
    }


def as_json(
    report: "Report", explanation: "Explanation | None", sources: list[str]
) -> dict[str, Any]:
    """Everything that is printed."""
    verdict = report.verdict
    found: dict[str, Any] = {
        "plan": plan_json(report.plan),
        "feasible": verdict.feasible,
        "faults": [[fault.subject, fault.what] for fault in verdict.faults],
        "unchecked": list(verdict.unchecked),
        "simulated": verdict.outcome._asdict() if verdict.outcome else None,
        "binding": [
            {"limit": b.limit, "changed": b.changed, "usd_per_h": b.usd_per_h}
            for b in report.bindings
        ],
        "alternatives": [
            {
                "what": each.what,
                "plan": plan_json(each.plan) if each.plan else None,
                "why": each.why,
            }
            for each in report.alternatives
        ],
        "sources": sources,
    }
    if explanation is not None:
        found["explained"] = {"sentences": list(explanation.sentences), **explanation.figures}
    return found


def choice_json(choice: Choice) -> dict[str, Any]:
    cost = choice.usd_per_1000 if math.isfinite(choice.usd_per_1000) else None
    return {
        "offer": choice.offer,
        "shape": shape_json(choice.shape),
        "requests_per_s": choice.requests_per_s,
        "usd_per_1000": cost,
        "share": choice.share,
        "why_not": choice.why,
    }
