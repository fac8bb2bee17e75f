"""However a write ends (killed, without power, without room, without permission), the newest whole
checkpoint is there, is exact, and what was passed over is named."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.checkpoint.crashes import KEEP, NEW, OLD, RANKS, crash, fine, prepare
from tests.train.checkpoint.disks import FullDisk, PowerLost, VolatileDisk
from tests.train.checkpoint.samples import is_state, save
from train.checkpoint.local import LocalStorage
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.storage import StorageError

SEEDS = [pytest.param(seed, marks=[] if 4 <= seed < 8 else pytest.mark.slow) for seed in range(20)]


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_within_a_write(tmp_path: Path, seed: int):
    after = crash(tmp_path, seed)
    assert fine(after), after


def test_a_manifest_written_first_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The mutation: files under their own names from the start. Some crash then leaves half a file
    that counts, or a folder that is never tidied."""
    monkeypatch.setattr(
        Path, "with_name", lambda self, name: self if name.startswith(".") else self.parent / name
    )
    monkeypatch.setattr("train.checkpoint.reader.decode", lenient)
    assert not all(survived(tmp_path / str(seed), seed) for seed in range(7, 200, 8))


def survived(root: Path, seed: int) -> bool:
    try:
        return fine(crash(root, seed))
    except Exception:
        return False


def lenient(text: bytes):
    """A decoder that asks for no sum."""
    from train.checkpoint.format import Manifest

    return Manifest.model_validate_json(text[len(b'{"sha256":"') + 64 + len(b'","body":') : -1])


def power_cut(tmp_path: Path, dies_at: int, seed: int, off: tuple[str, ...] = ()) -> str:
    """Cuts the power at a call of the third write; "" when what is found is right."""
    root, kept = tmp_path / f"live{dies_at}", tmp_path / "kept"
    root.mkdir()
    disk = VolatileDisk(root, off=off)
    storage = LocalStorage(root, disk)
    for step in (OLD - 1, OLD):
        save(storage, step, "a", RANKS, KEEP)
    begun = disk.calls
    disk.dies_at = begun + dies_at
    done = False
    try:
        save(storage, NEW, "b", RANKS, KEEP)
        done = True
    except PowerLost:
        pass
    disk.lose_power(kept, seed)
    found = CheckpointReader(LocalStorage(kept)).newest()
    if found is None or found.step not in ((NEW,) if done else (OLD, NEW)):
        return f"step {found and found.step} after {'all' if done else dies_at} calls"
    if not is_state({name: found.tensor(name) for name in found.names}, found.step):
        return "another state"
    return "" if not done else "done"


def test_the_power_may_go_at_any_call(tmp_path: Path):
    for call in range(200):
        answer = power_cut(tmp_path, call, seed=call)
        if answer == "done":
            break
        assert answer == "", (call, answer)
    assert answer == "done" and call > 30


@pytest.mark.parametrize("off", ["sync", "sync_folder"])
def test_without_a_sync_it_would_not_be_there(tmp_path: Path, off: str):
    """The mutation: both kinds of sync are needed."""
    answers = [power_cut(tmp_path, call, seed=call, off=(off,)) for call in range(0, 80, 3)]
    assert any(answer not in ("", "done") for answer in answers)


def assert_the_old_one(root: Path) -> CheckpointReader:
    reader = CheckpointReader(LocalStorage(root))
    found = reader.newest()
    assert found is not None and found.step == OLD
    assert is_state({name: found.tensor(name) for name in found.names}, OLD)
    return reader


@pytest.mark.parametrize("left_bytes", [0, 1000, 9000, 12000])
def test_a_full_disk(tmp_path: Path, left_bytes: int):
    prepare(tmp_path)
    with pytest.raises(StorageError, match="could not be written: the disk is full"):
        save(LocalStorage(tmp_path, FullDisk(left_bytes)), NEW, "b", RANKS, KEEP)
    assert_the_old_one(tmp_path)
    assert not list(tmp_path.glob("*/.*"))  # what was begun takes no room
    save(LocalStorage(tmp_path), NEW, "c", RANKS, KEEP)
    found = CheckpointReader(LocalStorage(tmp_path)).newest()
    assert found is not None and found.step == NEW
    assert len(list(tmp_path.iterdir())) == KEEP


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root; test_a_full_disk is the same without one")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path):
    root = small_disk / "run"
    prepare(root)
    (small_disk / "other").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * 4096 - 8192))
    with pytest.raises(StorageError, match="the disk is full"):
        save(LocalStorage(root), NEW, "b", RANKS, KEEP)
    assert_the_old_one(root)
    (small_disk / "other").unlink()
    save(LocalStorage(root), NEW, "c", RANKS, KEEP)
    found = CheckpointReader(LocalStorage(root)).newest()
    assert found is not None and found.step == NEW


def test_a_folder_that_may_only_be_read(tmp_path: Path):
    prepare(tmp_path)
    tmp_path.chmod(0o555)
    if os.getuid() == 0:  # root may write anywhere: the writer is somebody else
        for above in (tmp_path, *tmp_path.parents):
            if above.stat().st_mode & 0o001 == 0:
                above.chmod(above.stat().st_mode | 0o055)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            save(LocalStorage(tmp_path), NEW, "b", RANKS, KEEP)
            os.write(write, b"written")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    said = os.read(read, 4096).decode()
    os.close(read)
    tmp_path.chmod(0o755)
    assert said.startswith("StorageError") and said.endswith("permission denied"), said
    assert_the_old_one(tmp_path)
