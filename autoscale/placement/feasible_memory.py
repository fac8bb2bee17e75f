"""Memory of a plan, counted again: every matrix, key, value and activation of the fullest
accelerator of a replica. Used by `feasible`, which shares no code with the planners."""

from collections.abc import Iterator

from autoscale.catalog.model import ModelSize
from autoscale.placement.plan import Plan, ReplicaShape
from autoscale.placement.planner import Problem

TRAINING_BYTES = 16  # of a parameter: 16-bit weights and gradients, float32 Adam with its copy
STEP_TOKENS = 512  # the smallest step that a replica has to be able to make
GB = 1e9


def memory_faults(plan: Plan, problem: Problem) -> Iterator[str]:
    """A sentence for each purchase whose replicas do not fit, with the room that the profile says
    they have for keys and values."""
    assert problem.model is not None
    for purchase in plan.purchases:
        shape, model = purchase.shape, problem.model
        if plan.spans:
            return
        wrong = _undivided(shape, model)
        if wrong:
            yield f"{purchase.offer}: {wrong}"
            continue
        room = 0 if shape.role == "training" else problem.profile.kv_tokens(shape)
        needed = max(
            accelerator_bytes(shape, model, stage, room) for stage in range(shape.pipeline)
        )
        there = problem.catalog.kind(shape.kind).memory_bytes
        if needed > there:
            what = f"{purchase.offer}: a replica needs {needed / GB:.2f} GB of an accelerator"
            yield f"{what} with room for {room} tokens, {shape.kind} has {there / GB:.2f}"


def _undivided(shape: ReplicaShape, model: ModelSize) -> str:
    if model.heads % shape.tensor:
        return f"{model.heads} heads cannot be shared by tensor = {shape.tensor}"
    if shape.pipeline > model.layers:
        return f"{model.layers} layers cannot fill pipeline = {shape.pipeline} stages"
    return ""


def accelerator_bytes(shape: ReplicaShape, model: ModelSize, stage: int, kv_tokens: int) -> float:
    """Of one accelerator of a stage (from 0), its layers dealt out evenly, early stages first."""
    layers = model.layers // shape.pipeline + (stage < model.layers % shape.pipeline)
    # Keys and values of a head stay whole: more accelerators than heads hold copies.
    kv_heads = -(-model.kv_heads // shape.tensor)
    heads = model.heads // shape.tensor
    attention = model.hidden * model.head_dim * (2 * heads + 2 * kv_heads)
    inner = -(-model.feed_forward // shape.tensor)
    layer = attention + model.feed_forward_matrices * model.hidden * inner
    table = -(-model.vocab // shape.tensor) * model.hidden
    first, last = stage == 0, stage == shape.pipeline - 1
    tables = table * (first + last - (first and last and model.tied_head))
    if shape.role == "training":
        return TRAINING_BYTES * (layers * layer + tables)
    weights = layers * layer * shape.weight_bits / 8 + tables * max(16, shape.weight_bits) / 8
    keys = 2 * layers * kv_heads * model.head_dim * model.kv_bits / 8 * kv_tokens
    activations = STEP_TOKENS * 2 * (2 * model.hidden + inner)
    return weights + keys + activations
