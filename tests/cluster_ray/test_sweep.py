"""Who belongs to a session and who does not, with processes that are not Ray; what stays of it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.raylocal.record import (
    MARK_VARIABLE,
    SessionRecord,
    drop_record,
    load_record,
    ray_folder,
    save_record,
)
from cluster.raylocal.sweep import KEPT_LOGS, Swept, driver_lives, session_processes, sweep

SLEEP = "import sys, time; print(1, flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


@contextmanager
def sleeper(*words: str, mark: str = "", code: str = SLEEP) -> Iterator["subprocess.Popen[str]"]:
    """A process that waits, with words in its command line and a mark in its environment."""
    environment = {**os.environ, MARK_VARIABLE: mark} if mark else dict(os.environ)
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def record(tmp_path: Path) -> SessionRecord:
    folder = tmp_path / "sanderling-abc"
    logs = folder / "r" / "session_2026-01-01" / "logs"
    logs.mkdir(parents=True)
    (logs / "gcs.out").write_text("words")
    (folder / "r" / "session_latest").symlink_to(logs.parent)
    return SessionRecord("127.0.0.1:1", str(folder), "", 1, 0.0)


def test_record_round_trip(tmp_path: Path):
    record = SessionRecord("h:1", "/tmp/x", "/t", 7, 1.5)
    ray_folder(tmp_path).mkdir()
    assert load_record(tmp_path) is None
    save_record(tmp_path, record)
    assert load_record(tmp_path) == record
    drop_record(tmp_path)
    assert load_record(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"address": "h:1", "more": 2}'])
def test_foreign_record_is_refused(tmp_path: Path, text: str):
    ray_folder(tmp_path).mkdir()
    (ray_folder(tmp_path) / "session.json").write_text(text)
    with pytest.raises(ValueError, match="is not a session record"):
        load_record(tmp_path)


def test_sweep_ends_ours_and_spares_others(record: SessionRecord, tmp_path: Path):
    """Ours: by mark, by command line, one that ignores SIGTERM. Theirs: like names, reused pid."""
    mark = record.folder
    with (
        sleeper(mark=mark) as marked,
        sleeper(f"--log={mark}/r/x") as named,
        sleeper(mark=mark, code=STUBBORN) as stubborn,
        sleeper(mark=f"{mark}2") as neighbour,
        sleeper(f"--log={mark}2/r/x") as likewise,
        sleeper() as reused,
    ):
        started = psutil.Process(reused.pid).create_time()
        record = replace(record, driver_pid=reused.pid, driver_started_s=started - 100)
        ours = {marked.pid, named.pid, stubborn.pid}
        assert {process.pid for process in session_processes(record)} == ours
        swept = sweep(record, tmp_path / "data", grace_s=0.5)
        assert set(swept.ended_pids) == ours and swept.left_pids == ()
        assert [p.poll() for p in (neighbour, likewise, reused)] == [None, None, None]
        assert sweep(record, tmp_path / "data") == Swept((), (), ())


def test_driver_of_the_record_belongs(record: SessionRecord):
    with sleeper() as driver:
        started = psutil.Process(driver.pid).create_time()
        record = replace(record, driver_pid=driver.pid, driver_started_s=started)
        assert [process.pid for process in session_processes(record)] == [driver.pid]
        assert driver_lives(record)
        assert not driver_lives(replace(record, driver_started_s=started + 1))
        driver.kill()
        driver.wait()
        assert not driver_lives(record) and session_processes(record) == []


def test_the_caller_is_spared(record: SessionRecord):
    """A session ends itself with sweep(): its own process is the driver of the record."""
    me = psutil.Process()
    record = replace(record, driver_pid=me.pid, driver_started_s=me.create_time())
    assert session_processes(record) == []


def test_logs_stay_and_the_folder_goes(record: SessionRecord, tmp_path: Path):
    kept = ray_folder(tmp_path / "data") / "logs"
    for number in range(KEPT_LOGS):
        (kept / f"session_2025-01-0{number}").mkdir(parents=True)
    assert sweep(record, tmp_path / "data").removed == (record.folder,)
    assert not Path(record.folder).exists()
    assert (kept / "session_2026-01-01" / "gcs.out").read_text() == "words"
    assert len(list(kept.iterdir())) == KEPT_LOGS
    assert not (kept / "session_2025-01-00").exists(), "the oldest make room"


def test_a_visit_owns_nothing(tmp_path: Path):
    with sleeper() as other:
        started = psutil.Process(other.pid).create_time()
        visit = SessionRecord("h:1", "", "", other.pid, started)
        assert sweep(visit, tmp_path) == Swept((), (), ()) and other.poll() is None
