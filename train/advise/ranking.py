"""All forms of a job, the fastest first, and in how many ways the others fail."""

from collections import Counter
from dataclasses import dataclass

from train.advise.cost import Cost, Pricer
from train.advise.machines import Machines
from train.advise.options import Settings, options, told
from train.combine import refused
from train.job import Job
from train.weights import Start


@dataclass(frozen=True)
class Advised:
    """A form that fits. settings: what to write into the job's file."""

    job: Job
    settings: Settings
    cost: Cost

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.cost.seconds.total

    def hours(self) -> float:
        """Of all steps; without starting, checkpoints and evaluations."""
        return self.step_s * self.job.steps / 3600


@dataclass(frozen=True)
class Advice:
    """ranked: the fastest first, of equally fast ones the one of less memory; asked: the job as it
    is, None where it does not fit; refused, too_large: sentences, and how many forms each is said
    of; machines: what it rests on."""

    ranked: tuple[Advised, ...]
    asked: Advised | None
    refused: Counter[str]
    too_large: tuple[tuple[Settings, str], ...]
    machines: Machines

    def usd(self, advised: Advised) -> float:
        """Of all steps on all devices."""
        return advised.hours() * self.machines.usd_per_h


def advise(job: Job, start: Start, machines: Machines) -> Advice:
    """Every form of the job on these machines. ValueError where none fits."""
    if job.model.experts:
        raise ValueError(
            f"model.experts = {job.model.experts}: forms of a job with experts are not weighed; 0 "
            "is accepted, or --dry-run of each form"
        )
    pricer, sentences = Pricer(start, machines), Counter[str]()
    ranked: list[Advised] = []
    too_large: list[tuple[Settings, str]] = []
    for option in options(job, start.config.layers, not machines.alike):
        why = option.why
        if not why:
            try:
                cost = pricer.cost(option.job)
            except ValueError as error:
                why = str(error)
            else:
                if cost.why:
                    too_large.append((option.settings, cost.why))
                else:
                    ranked.append(_with_cuts(Advised(option.job, option.settings, cost)))
        if why:
            sentences[why] += 1
    if not ranked:
        least = min((why for _, why in too_large), key=_needed, default="nothing is accepted")
        raise ValueError(f"no form of the job fits its workers; the smallest {least}")
    ranked.sort(key=lambda found: (found.step_s, found.cost.memory.total))
    return Advice(tuple(ranked), _asked(job, pricer), sentences, tuple(too_large), machines)


def _with_cuts(advised: Advised) -> Advised:
    """A pipeline with the cuts that its cost is of, where a job may have them."""
    job, pipeline = advised.job, advised.cost.pipeline
    if pipeline is None:
        return advised
    cuts = tuple(stage.start for stage in pipeline.stages)
    table = job.pipeline.model_copy(update={"cuts": cuts})
    made = job.model_copy(update={"pipeline": table})
    if any(refused(made)):
        return advised
    return Advised(made, {**advised.settings, "pipeline.cuts": cuts}, advised.cost)


def _asked(job: Job, pricer: Pricer) -> Advised | None:
    cost = pricer.cost(job)
    names = (
        *("sharding.stage", "pipeline.stages", "pipeline.cuts", "workers.shares"),
        *("mesh.tensor", "mesh.sequence"),
        *("mesh.full_shard", "memory.activations", "memory.offload", "run.micro_batch_tokens"),
    )
    values = {}
    for name in names:
        table, field = name.split(".")
        values[name] = getattr(getattr(job, table), field)
    return None if cost.why else Advised(job, told(values), cost)


def _needed(why: str) -> float:
    """The MiB in a sentence of `cost`."""
    return float(why.split()[1].replace(",", ""))
