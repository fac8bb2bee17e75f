"""What a job will take: floating-point operations and bytes by count, activations and seconds by
trying one micro-batch here. Behind `--dry-run`, and the MFU of a run.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from models.config import ModelConfig
from train.job import Job
from train.layout import FlatModel
from train.memory.plan import memory_rows
from train.model import Llama
from train.optimizer import build_optimizer
from train.precision import COMPUTE
from train.weights import build_model, read_start

PROBE = 1024
"""Side of the square matrices whose product measures what the machine can do."""


@dataclass(frozen=True)
class Estimate:
    """Per worker, without what Python and torch take themselves.

    state_bytes: weights, masters, gradient and optimizer state at the job's sharding stage;
    activation_bytes: what one micro-batch keeps for its backward pass; step_s: of one optimizer
    step on all workers, from one micro-batch on this machine, cores shared among local workers;
    memory: what the job's `[memory]` changes of that, in words. The rest is without it.
    """

    parameters: int
    state_bytes: int
    activation_bytes: int
    step_s: float
    steps: int
    flops_per_token: float
    memory: Mapping[str, str] = field(default_factory=dict)

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.step_s * self.steps / 3600


def flops_per_token(config: ModelConfig, parameters: int, sequence_tokens: int) -> float:
    """Of one training token, forward and backward: six per weight that multiplies (Kaplan et al.
    2020), and causal attention's scores and sums over half a sequence on average."""
    looked_up = 0 if config.tied_head else config.vocab * config.hidden
    attention = 6 * config.layers * config.heads * config.head_dim * sequence_tokens
    return 6.0 * (parameters - looked_up) + attention


def peak_flops(dtype: torch.dtype, rounds: int = 5) -> float:
    """Floating-point operations per second of a large matrix product here, at its best."""
    a, b = (torch.ones(PROBE, PROBE, dtype=dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(rounds):
        started_s = time.perf_counter()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2.0 * PROBE**3 / best_s


def estimate(job: Job) -> Estimate:
    """Builds the job's model and tries one micro-batch of made-up tokens."""
    start = read_start(job)
    model = build_model(job, start)
    flat = FlatModel(model, COMPUTE[job.precision.compute])
    optimizer = build_optimizer(flat, job.optimizer)
    parameters = flat.masters.numel()
    samples = min(job.micro_samples, -(-job.batch_samples // job.workers.count))
    shape = (samples, job.data.sequence_tokens + 1)
    tokens = torch.arange(shape[0] * shape[1]).view(shape) % start.config.vocab
    activation_bytes = _kept_bytes(model, tokens)
    micro_s = min(_micro_s(model, tokens) for _ in range(2))
    portions = -(-job.batch_samples // (job.workers.count * samples))
    return Estimate(
        parameters,
        state_bytes(job, flat, sum(_bytes(t) for t in optimizer.tensors().values())),
        activation_bytes,
        micro_s * portions * _crowding(job),
        job.steps,
        flops_per_token(start.config, parameters, job.data.sequence_tokens),
        memory_rows(job, start.config, parameters),
    )


def state_bytes(job: Job, flat: FlatModel, optimizer_bytes: int) -> int:
    """Of a worker at the job's sharding stage (ZeRO, Rajbhandari et al. 2020, figure 1)."""
    stage, share = job.sharding.stage, 1 / job.workers.count
    weights, gradient = _bytes(flat.weights), _bytes(flat.gradient)
    masters = 0 if flat.masters is flat.weights else _bytes(flat.masters)
    kept = weights * (share if stage == 3 else 1) + gradient * (share if stage >= 2 else 1)
    return round(kept + (masters + optimizer_bytes) * (share if stage else 1))


def _kept_bytes(model: Llama, tokens: Tensor) -> int:
    """Of distinct tensors that a forward pass saves for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(tokens)
    del loss
    return sum(kept.values())


def _micro_s(model: Llama, tokens: Tensor) -> float:
    started_s = time.perf_counter()
    model.loss(tokens).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - started_s


def _crowding(job: Job) -> float:
    """How many threads share a core when all local workers compute; 1 elsewhere or at ease."""
    cores = psutil.cpu_count(logical=False) or 1
    threads = job.workers.count * torch.get_num_threads()
    return max(1.0, threads / cores) if job.workers.where == "local" else 1.0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
