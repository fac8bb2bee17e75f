"""The small files by which `up`, `down`, `status` and the background process find each other.

All in DATA_DIR/run. `progress` holds one JSON line per step; `settings.json` the resolved settings;
`host.json` the background process and the name of its shared memory.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cluster.settings import Settings
from serve.kv import shared


class Step(NamedTuple):
    """A step of the background process: session, front, serving, failed or stopped."""

    name: str
    text: str


@dataclass(frozen=True)
class RunFiles:
    """Paths and contents for one data folder; imports neither torch nor Ray."""

    data_dir: Path

    @property
    def folder(self) -> Path:
        return self.data_dir / "run"

    @property
    def settings(self) -> Path:
        return self.folder / "settings.json"

    @property
    def log(self) -> Path:
        return self.folder / "host.log"

    @property
    def _host(self) -> Path:
        return self.folder / "host.json"

    @property
    def _progress(self) -> Path:
        return self.folder / "progress"

    @property
    def run_id(self) -> str:
        return str(json.loads(self._host.read_text())["run_id"])

    @property
    def begun(self) -> bool:
        """Whether a run began here and was not cleared: it is under way, or was killed."""
        return self._host.exists()

    def begin(self, settings: Settings, run_id: str) -> None:
        """Lay the files of a new run; the process id follows with `started`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings.write_text(settings.model_dump_json())
        self._progress.write_text("")
        self._host.write_text(json.dumps({"run_id": run_id}))

    def started(self, pid: int) -> None:
        """Note which process the run is."""
        start = shared.process_start(pid)
        self._host.write_text(json.dumps({"run_id": self.run_id, "pid": pid, "start": start}))

    def host_pid(self) -> int | None:
        """The background process if it runs; None without one, also when its id was reused."""
        if not self.begun:
            return None
        body = json.loads(self._host.read_text())
        pid = body.get("pid")
        alive = pid is not None and shared.process_start(pid) == body["start"]
        return int(pid) if alive else None

    def say(self, name: str, text: str) -> None:
        """Append a step."""
        with self._progress.open("a") as file:
            file.write(json.dumps([name, text]) + "\n")

    def steps(self) -> list[Step]:
        """The steps so far, oldest first."""
        if not self._progress.exists():
            return []
        lines = self._progress.read_text().splitlines()
        return [Step(*json.loads(line)) for line in lines]

    def read_settings(self) -> Settings:
        """The settings of the run. ValueError when there was none."""
        if not self.settings.exists():
            raise ValueError(
                f"nothing was started with data_dir = {self.data_dir}; `sanderling up` starts it"
            )
        return Settings.model_validate_json(self.settings.read_text())

    def clear_segments(self) -> list[str]:
        """Remove the shared memory that dead replicas of this run left; returns the names."""
        return shared.sweep(f"sanderling-{self.run_id}-") if self.begun else []

    def clear(self) -> None:
        """Forget a run that has ended; the log stays."""
        for path in (self._host, self.settings, self._progress):
            path.unlink(missing_ok=True)


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file; empty when there is none."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def own_python_path() -> dict[str, str]:
    """The environment, with this project's packages importable by child processes."""
    root = str(Path(__file__).resolve().parent.parent)
    rest = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{root}:{rest}" if rest else root}
