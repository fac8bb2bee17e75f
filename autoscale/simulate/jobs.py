"""A training job with a deadline over a recorded series of one pool: who decides, what it costs,
and whether it is late."""

from typing import NamedTuple, Protocol

from autoscale.spot.deadline import Job, Mode, Now
from autoscale.spot.levels import Ints


class DeadlinePolicy(Protocol):
    """Decides what a job runs on in the coming step."""

    name: str

    def decide(self, now: Now) -> Mode: ...


class Ended(NamedTuple):
    """What a job came to."""

    usd: float
    steps: int
    on_time: bool
    changeovers: int


def run_job(job: Job, policy: DeadlinePolicy, available: Ints) -> Ended:
    """Run the job over `available` (one 0 or 1 for each step, at least deadline_steps of them). A
    spot machine that is taken has done its last step before; asking for spot that is not there is a
    bug."""
    mode: Mode = "idle"
    left, usd, changes, age = job.work_steps, 0.0, 0, 0
    for step in range(job.deadline_steps):
        there = bool(available[step])
        age = age + 1 if step and there == bool(available[step - 1]) else 0
        if mode == "spot" and not there:
            mode = "idle"
        wanted = policy.decide(Now(step, left, mode, there, age))
        assert wanted != "spot" or there, "spot was chosen where there is none"
        usd += {"idle": 0.0, "spot": job.spot_usd, "on_demand": job.on_demand_usd}[wanted]
        if wanted == mode and mode != "idle":
            left -= 1
        elif wanted != mode:
            changes += wanted != "idle"
        mode = wanted
        if left == 0:
            return Ended(usd, step + 1, True, changes)
    return Ended(usd, job.deadline_steps, False, changes)
