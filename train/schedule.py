"""The learning rate's course: a factor for each step of a run, a function of its number alone."""

import math

from train.job import ScheduleTable


def factor(schedule: ScheduleTable, step: int, steps: int) -> float:
    """What the highest learning rate is multiplied by in step `step` (from 0) of `steps`.

    All rise linearly over the warm-up, whose last step has factor 1. cosine then falls to `final`
    at the run's end (Loshchilov and Hutter 2017); wsd stays at 1 and falls linearly over the last
    `decay` (Hu et al. 2024); constant stays.
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "cosine":
        done = (step + 1 - warmup) / max(steps - warmup, 1)
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * min(done, 1))) / 2
    if schedule.name == "wsd":
        decay = round(schedule.decay * steps)
        left = max(steps - 1 - step, 0)
        return 1.0 if left >= decay else schedule.final + (1 - schedule.final) * left / decay
    return 1.0
