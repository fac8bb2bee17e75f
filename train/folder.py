"""A run's folder: who writes which file, and how they appear.

job.json          the job as it was resolved                          by the command, once
corpus/           token ids                                           by the command, once
checkpoints/      states to go on from                                by all workers
metrics.jsonl     a line for every reported step                      by rank 0
tensorboard/      the same for TensorBoard, if the job asks for it    by rank 0
status.json       where the run is                                    by rank 0
stop              there while somebody asks the run to end            by `train stop`
lock              locked while a command runs the workers
log/              what workers print; on request samples.jsonl       by rank 0
config.json, model.safetensors, tokenizer.json ...  the model so far  by rank 0
loss.png          the loss over tokens                                by the command, at the end
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train.job import Job

ENDED = ("finished", "stopped", "failed", "out of budget")


@dataclass(frozen=True)
class Status:
    """Where a run is. phase: "starting", "training" or one of ENDED; loss: nats per token, of the
    last step; bits_per_byte: on held-out text, when last evaluated; usd: spent so far;
    sent_bytes, dense_bytes: by a worker in the last step for the gradient's sum, and what it would
    be uncompressed."""

    phase: str
    step: int = 0
    steps: int = 0
    tokens: int = 0
    loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_s: float = 0.0
    mfu: float = 0.0
    left_s: float | None = None
    trained_s: float = 0.0
    usd: float = 0.0
    sent_bytes: int = 0
    dense_bytes: int = 0
    workers: int = 0
    generation: int = 0
    reason: str = ""


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.corpus = path / "corpus"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log"
        self.samples = self.log / "samples.jsonl"
        self.board = path / "tensorboard"
        self.plot = path / "loss.png"
        self._job, self._status = path / "job.json", path / "status.json"
        self._stop, self._lock = path / "stop", path / "lock"

    @property
    def begun(self) -> bool:
        """Whether there is a run here."""
        return self._job.is_file()

    def write_job(self, job: Job) -> None:
        """Keeps the job."""
        self.path.mkdir(parents=True, exist_ok=True)
        write(self._job, job.model_dump_json(indent=1))

    def job(self) -> Job:
        """The job of the run. ValueError when there is none."""
        if not self.begun:
            raise ValueError(f"{self.path} is not the folder of a training run (no job.json).")
        return Job.model_validate_json(self._job.read_bytes())

    def write_status(self, status: Status) -> None:
        """Replaces the status at once."""
        write(self._status, json.dumps(asdict(status)))

    def status(self) -> Status:
        """The last one written; "training" becomes "failed" when nobody runs the workers."""
        if not self._status.is_file():
            return Status("starting")
        status = Status(**json.loads(self._status.read_bytes()))
        if status.phase not in ENDED and not self.is_running():
            return replace(status, phase="failed", reason="its processes are gone")
        return status

    def ask_to_stop(self) -> None:
        """Has the run end after the step under way."""
        self._stop.touch()

    def clear_stop(self) -> None:
        """Takes that back."""
        self._stop.unlink(missing_ok=True)

    @property
    def stop_asked(self) -> bool:
        """Whether somebody did."""
        return self._stop.exists()

    def is_running(self) -> bool:
        """Whether a command runs this run's workers."""
        if not self._lock.exists():
            return False
        with self._lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time. ValueError when another one has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{self.path} is being trained already; `sanderling train status "
                    f"{self.path}` shows it, `sanderling train stop {self.path}` ends it."
                ) from None
            yield

    def append_metrics(self, values: dict[str, Any]) -> None:
        """One line."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines."""
        return read_lines(self.metrics)

    def drop_metrics_after(self, step: int) -> None:
        """Forgets steps that will be repeated."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def append_samples(self, step: int, ids: list[int]) -> None:
        """The ids of a step's samples, of all workers: rank r of n has computed the r-th of n
        contiguous shares."""
        self.log.mkdir(exist_ok=True)
        with self.samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "ids": ids}) + "\n")

    def drop_samples_after(self, step: int) -> None:
        """Forgets steps that will be repeated."""
        if self.samples.is_file():
            kept = [line for line in read_lines(self.samples) if line["step"] <= step]
            write(self.samples, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of JSON in a file; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
