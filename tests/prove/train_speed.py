"""Proof rows of training speed: torch's DDP on two workers and transformers' Trainer on one, both
with transformers' Llama, taken in turns with ours in the same processes. Medians of ratios; the
model is the demo's.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from tests.prove.row import Row
from tests.train.processes import on_ranks
from train.data.stream import SampleStream, share
from train.export import config_json
from train.job import Job
from train.journal import configure_torch
from train.step import Trainer
from train.weights import build_model, read_start
from train.world import LocalWorld, World

ROUNDS = 5
STEPS = 3
TEXT_TOKENS = 300_000


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured."""
    for compute in ("bfloat16", "float32"):
        ratios = on_ranks(2, against_ddp, compute)[0]
        yield _row(
            f"tokens/s on 2 workers, {compute}, ours / torch DDP's of transformers' Llama",
            ratios,
            1.0,
        )
    for compute in ("bfloat16", "float32"):
        ratios = on_ranks(1, against_trainer, compute)[0]
        yield _row(f"tokens/s on 1 process, {compute}, ours / transformers' Trainer's", ratios, 1.2)


class Ratio(NamedTuple):
    """Theirs / ours of one round: by the clock, and in processor time, which company on the
    machine changes less."""

    wall: float
    processor: float


def _row(check: str, ratios: list[Ratio], least: float) -> Row:
    """The verdict is by the clock."""
    walls, processor = [r.wall for r in ratios], [r.processor for r in ratios]
    ratio = statistics.median(walls)
    measured = f"{ratio:.2f} ({min(walls):.2f} to {max(walls):.2f} in {ROUNDS} rounds; "
    measured += f"{statistics.median(processor):.2f} in processor time)"
    return Row(check, f">= {least}", measured, ratio >= least)


class Taken(NamedTuple):
    """Seconds by the clock, and of the process's threads."""

    wall_s: float
    processor_s: float

    def over(self, other: "Taken") -> Ratio:
        """This one divided by another."""
        return Ratio(self.wall_s / other.wall_s, self.processor_s / other.processor_s)


def taken(run: Callable[[], None]) -> Taken:
    """What a call takes."""
    wall_s, processor_s = time.perf_counter(), time.process_time()
    run()
    return Taken(time.perf_counter() - wall_s, time.process_time() - processor_s)


def ours(compute: str, world: World) -> Callable[[], None]:
    """STEPS steps of the demo's job on made-up tokens, under the switches of a worker. What they
    set of the allocator stays set for the peer."""
    job = Job.model_validate({"precision": {"compute": compute}})
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (TEXT_TOKENS,), generator=random).numpy().astype("uint16")
    stream = SampleStream(tokens, job.data.sequence_tokens, 0)
    training = Trainer(job, build_model(job, read_start(job)), stream)

    def run() -> None:
        configure_torch(1, job.run.deterministic)
        for _ in range(STEPS):
            training.step(world)
        torch.use_deterministic_algorithms(False)

    return run


def llama() -> Any:
    """transformers' model of the demo's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = config_json(read_start(Job()).config, "float32")
    values.pop("architectures")
    return LlamaForCausalLM(LlamaConfig(**values))


def ddp(compute: str, world: World) -> Callable[[], None]:
    """transformers' Llama under DistributedDataParallel: float32 weights, autocast for bfloat16,
    torch's fused AdamW, clipping, the whole share of a step in one pass."""
    job, model = Job(), llama()
    parallel = DistributedDataParallel(model, process_group=world.group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    data = torch.randint(0, 256, (TEXT_TOKENS,))
    length = job.data.sequence_tokens
    mine = share(0, job.batch_samples, world.rank, world.size).samples
    position = 0

    def run() -> None:
        nonlocal position
        for _ in range(STEPS):
            first = position % (TEXT_TOKENS // 2)
            batch = torch.stack(
                [data[first + n * length : first + (n + 1) * length] for n in range(mine)]
            )
            position += mine * length
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
                loss = parallel(input_ids=batch, labels=batch).loss
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()

    return run


def against_ddp(world: World, compute: str) -> list[Ratio]:
    """One round after the other, the first left out."""
    pair = (ours(compute, world), ddp(compute, world))

    def together(run: Callable[[], None]) -> Taken:
        world.barrier()
        return taken(lambda: _both(run, world.barrier))

    rounds = [tuple(together(run) for run in pair) for _ in range(ROUNDS + 1)]
    return [theirs.over(mine) for mine, theirs in rounds[1:]]


def _both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


def against_trainer(_world: World, compute: str) -> list[Ratio]:
    """The same against transformers' own Llama under its Trainer; its time is without its start."""
    mine = ours(compute, LocalWorld())
    rounds = [(taken(mine), trainer(compute)) for _ in range(ROUNDS + 1)]
    return [theirs.over(us) for us, theirs in rounds[1:]]


def trainer(compute: str) -> Taken:
    """STEPS optimizer steps of transformers' Trainer, after its first."""
    from transformers import Trainer as TheirTrainer
    from transformers import TrainerCallback, TrainingArguments

    job = Job()
    samples = [
        {"input_ids": row, "labels": row} for row in torch.randint(0, 256, (64, 256)).unbind()
    ]
    wall_s: list[float] = []
    processor_s: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall_s.append(time.perf_counter())
            processor_s.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=str(Path(folder)),
            per_device_train_batch_size=job.batch_samples,
            max_steps=STEPS + 1,
            bf16=compute == "bfloat16",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_grad_norm=1.0,
            weight_decay=0.1,
            learning_rate=1e-3,
        )
        TheirTrainer(llama(), arguments, train_dataset=samples, callbacks=[Clock()]).train()
    return Taken(wall_s[-1] - wall_s[0], processor_s[-1] - processor_s[0])
