"""Ends what is left of a session: its processes and its temporary folder, and nothing else.

A process belongs to a session if it is the driver the record names, or if the session's private
folder (a fresh random name) is in its command line or in its mark (record.MARK_VARIABLE). Another
Ray on the machine has neither. `stop()` of a session ends with it; `down` calls it when the driver
was killed. The kernel ends most of Ray with its driver; the rest follows within seconds, and this
does not wait for it.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.raylocal.record import LOGS_FOLDER, MARK_VARIABLE, SessionRecord, ray_folder

SAME_START_S = 0.05
"""Two readings of one process's start time differ by less (clock ticks are 10 ms)."""
KEPT_LOGS = 5


@dataclass(frozen=True)
class Swept:
    """What a sweep found: processes ended by it, those that would not end, paths removed."""

    ended_pids: tuple[int, ...]
    left_pids: tuple[int, ...]
    removed: tuple[str, ...]


def driver_lives(record: SessionRecord) -> bool:
    """Whether the process that started the session still runs (it may be the caller)."""
    try:
        return _is_driver(psutil.Process(record.driver_pid), record)
    except psutil.NoSuchProcess:
        return False


def _is_driver(process: psutil.Process, record: SessionRecord) -> bool:
    """Same process id and same start: not a later process that was given the number."""
    same = abs(process.create_time() - record.driver_started_s) < SAME_START_S
    return same and process.status() != psutil.STATUS_ZOMBIE


def session_processes(record: SessionRecord) -> list[psutil.Process]:
    """The live processes of the session, without the caller and its parents."""
    if not record.embedded:
        return []
    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    return [
        process
        for process in psutil.process_iter()
        if process.pid not in spared and _belongs(process, record)
    ]


def _belongs(process: psutil.Process, record: SessionRecord) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.pid == record.driver_pid:
            return _is_driver(process, record)
        if process.environ().get(MARK_VARIABLE) == record.folder:
            return True
        return any(f"{record.folder}/" in word for word in process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        # Gone meanwhile, or another user's: a session's processes are all its driver's user's.
        return False


def sweep(record: SessionRecord, data_dir: Path, grace_s: float = 3.0) -> Swept:
    """End every process of the session, keep its logs in the data folder, remove its folder.

    Processes get SIGTERM and after `grace_s` SIGKILL. Attached sessions have nothing of ours.
    Idempotent; a second sweep finds nothing.
    """
    found = session_processes(record)
    left = _end(found, grace_s)
    # Workers and proxies that were being started while their parent went.
    late = [process for process in session_processes(record) if process not in found]
    left += _end(late, grace_s)
    ended = tuple(process.pid for process in (*found, *late) if process not in left)
    removed = () if left else _remove_folder(record, data_dir)
    return Swept(ended, tuple(process.pid for process in left), removed)


def _end(processes: Iterable[psutil.Process], grace_s: float) -> list[psutil.Process]:
    waiting = list(processes)
    for signal_once in (psutil.Process.terminate, psutil.Process.kill):
        for process in waiting:
            try:
                signal_once(process)
            except psutil.NoSuchProcess:
                continue
        waiting = psutil.wait_procs(waiting, timeout=grace_s)[1]
    return waiting


def _remove_folder(record: SessionRecord, data_dir: Path) -> tuple[str, ...]:
    folder = Path(record.folder)
    if not record.embedded or not folder.is_dir() or folder.is_symlink():
        return ()
    if folder.stat().st_uid != os.getuid():
        return ()
    _keep_logs(folder, ray_folder(data_dir) / LOGS_FOLDER)
    shutil.rmtree(folder)
    return (record.folder,)


def _keep_logs(folder: Path, target: Path) -> None:
    """Copy Ray's logs into the data folder, one folder per session, the newest KEPT_LOGS."""
    for logs in folder.glob("r/session_2*/logs"):
        if not logs.parent.is_symlink():
            shutil.copytree(
                logs, target / logs.parent.name, dirs_exist_ok=True, ignore=_not_plain_files
            )
    for old in sorted(target.glob("session_2*"))[:-KEPT_LOGS]:
        shutil.rmtree(old)


def _not_plain_files(folder: str, names: list[str]) -> list[str]:
    paths = {name: Path(folder, name) for name in names}
    return [n for n, p in paths.items() if p.is_symlink() or not (p.is_file() or p.is_dir())]
