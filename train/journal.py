"""What rank 0 writes down of a run: metrics, status, and whether the budget is used up."""

import ctypes
import time
from dataclasses import replace
from typing import Any

import torch

from models.config import ModelConfig
from train.estimate import active, flops_per_token, peak_flops
from train.folder import RunFolder, Status
from train.job import Job
from train.precision import COMPUTE
from train.step import StepReport
from train.world import World

STATUS_S = 0.3
"""Time between two status files."""
SMOOTHING = 0.9
"""Of the step time that rates and times left are told from."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt (malloc.h)."""
KEPT_BYTES = 1 << 30
LARGEST_HEAP_BYTES = 32 << 20
"""The most that M_MMAP_THRESHOLD takes on 64 bits."""


class Journal:
    """The records of one run while this process is rank 0."""

    def __init__(self, job: Job, folder: RunFolder, config: ModelConfig, parameters: int) -> None:
        self.job, self.folder = job, folder
        self.status = Status("starting", steps=job.steps)
        self.flops_per_token = flops_per_token(
            config, active(job, config, parameters), job.data.sequence_tokens
        )
        self.peak = 0.0
        self._step_s, self._last_s, self._written_s = 0.0, 0.0, 0.0
        self._open_board = _board_opener() if job.report.tensorboard else None
        self._board: Any = None

    def begin(self, step: int, trained_s: float, usd: float, world: World) -> None:
        """Training starts, or goes on, after `step` steps that took so long and cost so much."""
        self.folder.drop_metrics_after(step)
        self._close_board()
        if self._open_board is not None:
            # Steps that will be repeated are forgotten there, too.
            self._board = self._open_board(str(self.folder.board), purge_step=step + 1)
        self.peak = self.peak or peak_flops(COMPUTE[self.job.precision.compute])
        tokens = step * self.job.run.batch_tokens
        self.status = replace(
            self.status,
            phase="training",
            step=step,
            tokens=tokens,
            trained_s=trained_s,
            usd=usd,
            workers=world.size,
            generation=world.generation,
        )
        self.folder.write_status(self.status)
        self._step_s, self._last_s = 0.0, time.monotonic()

    def note(self, report: StepReport) -> None:
        """A finished step."""
        now_s = time.monotonic()
        took_s, self._last_s = now_s - self._last_s, now_s
        old_s = self._step_s or took_s
        self._step_s = SMOOTHING * old_s + (1 - SMOOTHING) * took_s
        rate = self.job.run.batch_tokens / self._step_s
        size = self.status.workers
        hourly = size * self.job.budget.usd_per_worker_h
        self.status = replace(
            self.status,
            step=report.step,
            tokens=report.step * self.job.run.batch_tokens,
            loss=report.loss,
            sent_bytes=report.sent_bytes,
            dense_bytes=report.dense_bytes,
            tokens_per_s=rate,
            mfu=rate * self.flops_per_token / (size * self.peak),
            left_s=(self.job.steps - report.step) * self._step_s,
            trained_s=self.status.trained_s + took_s,
            usd=self.status.usd + took_s / 3600 * hourly,
        )
        if report.step % self.job.report.every_steps == 0 or report.step == self.job.steps:
            self._write_metrics(report, took_s)
        if now_s - self._written_s >= STATUS_S:
            self.folder.write_status(self.status)
            self._written_s = now_s

    def evaluated(self, bits_per_byte: float) -> None:
        """What held-out text costs under the model of the last step."""
        self.status = replace(self.status, bits_per_byte=bits_per_byte)
        line = {"step": self.status.step, "tokens": self.status.tokens}
        self._append(line | {"bits_per_byte": bits_per_byte})

    def end(self, phase: str, reason: str = "") -> None:
        """Training ends, for now or for good."""
        self.status = replace(self.status, phase=phase, reason=reason)
        self.folder.write_status(self.status)
        self._close_board()

    def rest(self, taken_s: float) -> None:
        """Time between steps (a checkpoint, an evaluation) that is not the next step's."""
        hourly = self.status.workers * self.job.budget.usd_per_worker_h
        self._last_s += taken_s
        self.status = replace(
            self.status,
            trained_s=self.status.trained_s + taken_s,
            usd=self.status.usd + taken_s / 3600 * hourly,
        )

    def over_budget(self) -> str:
        """Why the run must pause, or nothing."""
        budget = self.job.budget
        if budget.hours is not None and self.status.trained_s >= budget.hours * 3600:
            return f"budget.hours = {budget.hours} are used up"
        if budget.usd is not None and self.status.usd >= budget.usd:
            return f"budget.usd = {budget.usd} are spent"
        return ""

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None

    def _write_metrics(self, report: StepReport, took_s: float) -> None:
        self._append(
            {
                "step": report.step,
                "tokens": self.status.tokens,
                "loss": report.loss,
                "gradient_norm": report.gradient_norm,
                "learning_rate": report.learning_rate,
                "step_s": took_s,
                "sent_bytes": report.sent_bytes,
                "workers": self.status.workers,
                "generation": self.status.generation,
            }
        )

    def _append(self, line: dict[str, Any]) -> None:
        self.folder.append_metrics(line)
        if self._board is not None:
            for name in line.keys() - {"step"}:
                self._board.add_scalar(name, line[name], line["step"])


def _board_opener() -> Any:
    """TensorBoard's writer, a class. ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "report.tensorboard = true needs TensorBoard: pip install sanderling[tensorboard], "
            "or leave it false and read metrics.jsonl, which has the same numbers."
        ) from None
    return SummaryWriter


def configure_torch(threads: int, deterministic: bool) -> None:
    """The process-wide switches of a worker."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    # Nothing reads a new tensor before it is written, and filling them all is a pass over each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for what is allocated next. A step's tensors are megabytes,
    which it would give back to the kernel and get again page by page, a tenth of a step's time.
    Other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BYTES)
