"""What is written is read, at any layout; what is not whole is passed over, and it is said why."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.checkpoint.samples import is_state, save, state
from train.checkpoint.format import Damaged, decode
from train.checkpoint.local import LocalStorage
from train.checkpoint.piece import Piece, share, stretch
from train.checkpoint.reader import Checkpoint, CheckpointReader
from train.checkpoint.storage import open_storage
from train.checkpoint.writer import CheckpointWriter, NotCommitted


def newest(root: Path) -> Checkpoint:
    found = CheckpointReader(LocalStorage(root)).newest()
    assert found is not None
    return found


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("size", [1, 3, 4])
def test_what_was_written_is_read(tmp_path: Path, size: int):
    save(LocalStorage(tmp_path), 7, "a", size)
    found = newest(tmp_path)
    assert found.step == 7 and found.meta == {"step": 7}
    assert is_state(tensors(found), 7)


def test_any_stretch_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Written at 4, read at 3, with chunks so small that every edge is met."""
    monkeypatch.setattr("train.checkpoint.format.chunks.__defaults__", (64,))
    monkeypatch.setattr("train.checkpoint.writer.CHUNK_BYTES", 64)
    save(LocalStorage(tmp_path), 3, "a", 4)
    found = newest(tmp_path)
    assert found.manifest.chunk_bytes == 64
    for name, whole in state(3).items():
        flat = whole.reshape(-1)
        for rank in range(3):
            start, stop = len(flat) * rank // 3, len(flat) * (rank + 1) // 3
            assert torch.equal(found.read(name, start, stop), flat[start:stop])
    flat = state(3)["exp_avg/embed"].reshape(-1)
    for start in range(0, 60, 7):
        for stop in range(start, len(flat), 31):
            assert torch.equal(found.read("exp_avg/embed", start, stop), flat[start:stop])


def test_parts_are_safetensors(tmp_path: Path):
    """Read by safetensors itself."""
    save(LocalStorage(tmp_path), 1, "a", 2)
    theirs: dict[str, torch.Tensor] = {}
    for path in sorted(tmp_path.glob("*/*.safetensors")):
        theirs |= load_file(path)
    wanted = state(1)["master/embed"].reshape(-1)
    half = len(wanted) // 2
    assert torch.equal(theirs[f"master/embed[0:{half}]"], wanted[:half])
    assert torch.equal(theirs[f"master/embed[{half}:{len(wanted)}]"], wanted[half:])


def test_only_the_last_are_kept(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save(LocalStorage(tmp_path), step, "a", keep=2)
    assert folders(tmp_path) == [
        "step-00000003.a",
        "step-00000004.a",
    ]


def test_the_same_step_again_replaces_the_old(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    save(storage, 1, "a")
    save(storage, 2, "a")
    save(storage, 2, "b")
    assert newest(tmp_path).folder == "step-00000002.b"
    assert folders(tmp_path) == [
        "step-00000001.a",
        "step-00000002.b",
    ]


def test_a_run_can_go_back(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    for step in (1, 2, 3):
        save(storage, step, "a", keep=9)
    CheckpointWriter(storage, "b").rewind(1)
    assert newest(tmp_path).step == 1
    save(storage, 2, "b", keep=9)
    assert newest(tmp_path).folder == "step-00000002.b"


def test_a_part_of_another_attempt_is_none_of_ours(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    CheckpointWriter(storage, "a").write(5, {}, share(state(5), 1, 2), 1, 2)
    CheckpointWriter(storage, "b").write(5, {}, share(state(5), 0, 2), 0, 2)
    with pytest.raises(NotCommitted, match="rank 1 gave no receipt"):
        CheckpointWriter(storage, "b").commit(5, 2, timeout_s=0)
    assert CheckpointReader(storage).newest() is None


def test_gaps_are_not_committed(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    values = torch.arange(10.0)
    for rank, (start, stop) in enumerate([(0, 4), (5, 10)]):
        CheckpointWriter(storage, "a").write(1, {}, [stretch("w", values, start, stop)], rank, 2)
    with pytest.raises(NotCommitted, match="w lacks elements 4 to 4"):
        CheckpointWriter(storage, "a").commit(1, 2)
    assert CheckpointReader(storage).newest() is None


def test_what_cannot_be_kept_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="complex64; a checkpoint holds float64"):
        stretch("w", torch.zeros(2, dtype=torch.complex64), 0, 2)
    with pytest.raises(ValueError, match="keep = 0"):
        CheckpointWriter(LocalStorage(tmp_path), "a", keep=0)
    with pytest.raises(ValueError, match="gs://x.*a folder or s3://"):
        open_storage("gs://x")
    assert isinstance(open_storage(str(tmp_path)), LocalStorage)
    with pytest.raises(AssertionError):
        Piece("w", (2,), "float32", 0, 3, torch.zeros(3))


def two(root: Path) -> Path:
    """Checkpoints of steps 1 and 2; the folder of the newer."""
    for step in (1, 2):
        save(LocalStorage(root), step, "a", 2)
    return root / "step-00000002.a"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_is_noticed_anywhere(tmp_path: Path):
    """Every 97th bit of every file that a reader depends on; once each, the older one loads."""
    folder = two(tmp_path)
    tried = 0
    for path in [folder / "manifest.json", *sorted(folder.glob("*.safetensors"))]:
        kept = path.read_bytes()
        for bit in range(0, len(kept) * 8, 997 if path.suffix == ".json" else 241):
            flip(path, bit)
            reader = CheckpointReader(LocalStorage(tmp_path))
            found = reader.newest()
            assert found is not None and found.step == 1, (path.name, bit)
            assert [passed.folder for passed in reader.passed_over] == [folder.name]
            path.write_bytes(kept)
            tried += 1
    assert tried > 200
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize("name", ["part-00001-of-00002.safetensors", "manifest.json"])
def test_a_truncated_file_is_noticed(tmp_path: Path, name: str):
    folder = two(tmp_path)
    kept = (folder / name).read_bytes()
    for length in {0, 1, 9, len(kept) // 2, len(kept) - 1}:
        (folder / name).write_bytes(kept[:length])
        reader = CheckpointReader(LocalStorage(tmp_path))
        found = reader.newest()
        assert found is not None and is_state(tensors(found), 1)
        reason = reader.passed_over[0].reason
        assert ("manifest" in reason) if name == "manifest.json" else ("bytes" in reason), reason
    (folder / name).write_bytes(kept + b"x")
    found = CheckpointReader(LocalStorage(tmp_path)).newest()
    assert found is not None and found.step == 1


def test_what_is_missing_is_said(tmp_path: Path):
    folder = two(tmp_path)
    (folder / "part-00000-of-00002.safetensors").unlink()
    reader = CheckpointReader(LocalStorage(tmp_path))
    found = reader.newest()
    assert found is not None and found.step == 1
    assert "part-00000-of-00002.safetensors is not there" in reader.passed_over[0].reason
    (folder / "manifest.json").unlink()
    assert newest(tmp_path).step == 1
    reader.newest()
    assert reader.passed_over[0].reason == "it has no manifest: its writing never ended"


def test_a_read_without_verifying_still_compares(tmp_path: Path):
    folder = two(tmp_path)
    path = folder / "part-00000-of-00002.safetensors"
    flip(path, path.stat().st_size * 8 - 1)
    found = CheckpointReader(LocalStorage(tmp_path)).newest(verify=False)
    assert found is not None and found.step == 2
    with pytest.raises(Damaged, match="has changed within"):
        tensors(found)


def test_without_sums_damage_would_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The mutation: the sums are what notices it."""
    monkeypatch.setattr("train.checkpoint.writer.sum_of", lambda chunk: 0)
    monkeypatch.setattr("train.checkpoint.reader.sum_of", lambda chunk: 0)
    folder = two(tmp_path)
    path = folder / "part-00000-of-00002.safetensors"
    flip(path, path.stat().st_size * 8 - 1)
    assert newest(tmp_path).step == 2


def test_a_manifest_of_another_format_is_refused(tmp_path: Path):
    folder = two(tmp_path)
    text = (folder / "manifest.json").read_bytes()
    with pytest.raises(Damaged):
        decode(text.replace(b"checkpoint-1", b"checkpoint-2"))
    head = (folder / "part-00000-of-00002.safetensors").read_bytes()
    length = struct.unpack("<Q", head[:8])[0]
    assert json.loads(head[8 : 8 + length])["__metadata__"] == {"format": "sanderling-checkpoint-1"}
