"""What a running session leaves for other commands: one small file in the data folder.

Written before the first process is started and removed after the last one has ended, so a record
that is there means that something may have to be swept (sweep.py). `status` and `down` read it.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

RAY_FOLDER = "ray"
RECORD_FILE = "session.json"
TOKEN_FILE = "token"
LOGS_FOLDER = "logs"

MARK_VARIABLE = "_SANDERLING_SESSION"
"""In the environment of every process of a session that we started; its value is `folder`.
The underscore keeps it out of the settings' SANDERLING_* namespace."""


@dataclass(frozen=True)
class SessionRecord:
    """Who started which Ray.

    address: host:port of the cluster's GCS; empty while it is starting.
    folder: the private temporary folder of a Ray that we started; empty when we attached to one.
    token_file: where the cluster's token is; empty without auth or with a token not ours.
    driver_pid, driver_started_s: the process that started it, and when (seconds since the epoch:
        with it a reused process id is told apart).
    """

    address: str
    folder: str
    token_file: str
    driver_pid: int
    driver_started_s: float

    @property
    def embedded(self) -> bool:
        """True for a Ray of our own, false for somebody else's that we attached to."""
        return bool(self.folder)


def ray_folder(data_dir: Path) -> Path:
    """Where a session keeps its record, token and logs inside the data folder."""
    return data_dir.absolute() / RAY_FOLDER


def save_record(data_dir: Path, record: SessionRecord) -> None:
    """Write the record, all or nothing."""
    path = ray_folder(data_dir) / RECORD_FILE
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
    os.replace(fresh, path)


def load_record(data_dir: Path) -> SessionRecord | None:
    """The record of the session that runs, or ran and was not cleaned up; None without one.

    ValueError when the file is not one of ours.
    """
    path = ray_folder(data_dir) / RECORD_FILE
    if not path.exists():
        return None
    try:
        return SessionRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a session record ({error}); remove it if no session runs"
        ) from error


def drop_record(data_dir: Path) -> None:
    """Forget the session: the record and its token go, the logs stay."""
    for name in (RECORD_FILE, TOKEN_FILE):
        (ray_folder(data_dir) / name).unlink(missing_ok=True)
