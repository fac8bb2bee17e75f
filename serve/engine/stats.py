"""What an engine counts, as a plain value: read by the controller, the ingress and /metrics.

Apart from engine.py, so that those processes import no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counters and gauges of one engine; tokens and pages since start.

    recomputed_tokens: computed here though another replica had computed them before.
    """

    running: int
    waiting: int
    reserved: int
    held: int
    pages: int
    free_pages: int
    evictable_pages: int
    preemptions: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    recomputed_tokens: int = 0
