"""KV storage: layout, copies, shared memory seen from another process, nothing left behind."""

import gc
import os
import subprocess
import sys
import textwrap
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.kv_formats import FORMATS
from serve.kv import shared
from serve.kv.pool import PagePool
from serve.kv.storage import KVShape, KVStorage

SHAPE = KVShape(layers=3, pages=5, page_tokens=4, kv_heads=2, head_dim=32)
shared_only = pytest.mark.skipif(
    not shared.SHARED_DIRECTORY.is_dir(), reason="this system has no /dev/shm"
)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"sanderling-test-{uuid.uuid4().hex}-kv"
    yield name
    left = shared.SHARED_DIRECTORY / name
    exists = left.exists()
    left.unlink(missing_ok=True)
    assert not exists, "the test left its shared memory behind"


def run_child(code: str, *arguments: str) -> str:
    """Runs code in a fresh interpreter with every warning an error; its output."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What a head of 32 values takes: its elements, their type, and how many bytes that is.
HEADS = {
    "float32": (32, torch.float32, 128),
    "float16": (32, torch.float16, 64),
    "bfloat16": (32, torch.bfloat16, 64),
    "int8": (36, torch.uint8, 36),  # and a float32 scale
    "int4": (20, torch.uint8, 20),  # and fifth bits of keys, or a half of keys and one of values
}


@pytest.mark.parametrize("kv_format", FORMATS)
def test_layout_and_size(kv_format):
    elements, dtype, head_bytes = HEADS[kv_format]
    storage = KVStorage(SHAPE, kv_format)
    assert storage.tensor.shape == (3, 2, 5, 4, 2, elements) and storage.tensor.dtype == dtype
    assert storage.tensor.is_contiguous() and not storage.tensor.any()
    assert storage.token_bytes == 2 * 3 * 2 * head_bytes
    assert storage.tensor.nbytes == storage.token_bytes * 5 * 4
    assert storage.generation.tolist() == [0] * 5
    storage.tensor[1, 0, 3, 2] = 5
    rows = storage.tensor[1, 0].view(-1, 2, elements)
    assert (rows[3 * 4 + 2] == 5).all() and rows.count_nonzero() == 2 * elements


@pytest.mark.parametrize("kv_format", ["float32", "int8"])
def test_copy_page_copies_every_layer_and_nothing_else(kv_format):
    storage = KVStorage(SHAPE, kv_format)
    storage.tensor.random_(256, generator=torch.Generator().manual_seed(0))
    before = storage.tensor.clone()
    storage.copy_page(1, 4)
    expected = before.clone()
    expected[:, :, 4] = before[:, :, 1]
    assert torch.equal(storage.tensor, expected)


@shared_only
@pytest.mark.parametrize("kv_format", FORMATS)
def test_another_process_reads_it(name, kv_format):
    storage = KVStorage(SHAPE, kv_format, name)
    storage.tensor.copy_(torch.arange(storage.tensor.numel()).view_as(storage.tensor) % 97)
    pool = PagePool(5, 4, storage)
    pool.release(pool.allocate(3) or [])
    child = """
        import sys
        import torch
        from serve.kv.storage import KVStorage
        peer = KVStorage.attach(sys.argv[1])
        assert not peer.owned and peer.kv_format == sys.argv[2]
        expected = torch.arange(peer.tensor.numel()).view_as(peer.tensor) % 97
        assert torch.equal(peer.tensor, expected.to(peer.tensor.dtype))
        print(peer.generation.tolist(), peer.token_bytes, peer.owner_pid, peer.shape)
        try:
            peer.generation[0] = 1
        except ValueError:
            print("read-only")
        peer.close()
        peer.close()
    """
    told = run_child(child, name, kv_format).splitlines()
    assert told[0] == f"[1, 1, 1, 0, 0] {storage.token_bytes} {os.getpid()} {SHAPE}"
    assert told[1] == "read-only"
    assert (shared.SHARED_DIRECTORY / name).exists(), "a reader's close removed the file"
    storage.close()


@shared_only
def test_a_reader_sees_pages_written_later_and_cannot_write(name):
    storage = KVStorage(SHAPE, "float32", name)
    peer = KVStorage.attach(name)
    storage.tensor[0, 0, 2] = 3.0
    storage.generation[2] = 8
    assert (peer.tensor[0, 0, 2] == 3).all() and peer.generation[2] == 8
    with pytest.raises(AssertionError, match="read-only"):
        peer.copy_page(0, 1)
    child = """
        import resource, sys
        from serve.kv.storage import KVStorage
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        KVStorage.attach(sys.argv[1]).tensor.fill_(1)
    """
    with pytest.raises(AssertionError):
        run_child(child, name)
    assert peer.tensor.sum() == 3 * 4 * 2 * 32
    storage.close()


@shared_only
def test_close_is_idempotent_and_tensors_outlive_it(name):
    storage = KVStorage(SHAPE, "float32", name)
    path = shared.SHARED_DIRECTORY / name
    assert path.stat().st_mode & 0o777 == 0o600
    kept = KVStorage.attach(name).tensor
    storage.tensor[2] = 1
    storage.close()
    storage.close()
    assert not path.exists()
    with pytest.raises(AssertionError, match="closed"):
        _ = storage.tensor
    del storage
    gc.collect()
    assert kept[2].sum() == kept[2].numel(), "the reader's memory went with the owner"


@shared_only
def test_memory_is_committed_as_it_is_written(name):
    shape = KVShape(layers=30, pages=2048, page_tokens=16, kv_heads=3, head_dim=64)
    storage = KVStorage(shape, "bfloat16", name)
    committed = (shared.SHARED_DIRECTORY / name).stat().st_blocks * 512
    assert storage.tensor.nbytes > 700_000_000 and committed < 1_000_000
    storage.tensor[:, :, 0] = 1
    committed = (shared.SHARED_DIRECTORY / name).stat().st_blocks * 512
    page_bytes = storage.token_bytes * 16
    assert page_bytes <= committed <= page_bytes + 60 * 2 * 4096 + 1_000_000
    storage.close()


def test_private_memory_is_committed_as_it_is_written():
    child = """
        import resource, torch
        from serve.kv.storage import KVShape, KVStorage
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        storage = KVStorage(KVShape(30, 2048, 16, 3, 64), "bfloat16")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert storage.tensor.nbytes > 700_000_000
        print((after - before) * 1024)
    """
    assert int(run_child(child)) < 50_000_000


def test_attaching_is_quiet(name):
    storage = KVStorage(SHAPE, "float32", name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KVStorage.attach(name)
    storage.close()


@shared_only
def test_a_live_owner_keeps_its_name_and_a_dead_one_loses_it(name):
    child = """
        import os, sys, torch
        from serve.kv.storage import KVShape, KVStorage
        storage = KVStorage(KVShape(1, 2, 2, 1, 4), "float32", sys.argv[1])
        os._exit(0)  # as SIGKILL would: no finally, no close
    """
    run_child(child, name)
    assert (shared.SHARED_DIRECTORY / name).exists()
    storage = KVStorage(SHAPE, "float32", name)
    assert KVStorage.attach(name).shape == SHAPE
    with pytest.raises(ValueError, match="in use by a live process"):
        KVStorage(SHAPE, "float32", name)
    storage.close()


@shared_only
def test_sweep_takes_what_the_dead_left_and_nothing_else(name):
    child = """
        import os, sys, torch
        from serve.kv.storage import KVShape, KVStorage
        storage = KVStorage(KVShape(1, 2, 2, 1, 4), "float32", sys.argv[1])
        os._exit(0)
    """
    dead, foreign = name[:-3] + "-dead-kv", shared.SHARED_DIRECTORY / (name[:-3] + "-foreign")
    storage = KVStorage(SHAPE, "float32", name)
    run_child(child, dead)
    foreign.write_text("not ours")
    assert shared.sweep(name[:-3]) == [dead]
    assert foreign.exists() and (shared.SHARED_DIRECTORY / name).exists()
    foreign.unlink()
    storage.close()


def truncated(path: Path) -> None:
    os.truncate(path, 5000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def foreign_magic(path: Path) -> None:
    patch(path, 0, b"GGUF")


def other_version(path: Path) -> None:
    patch(path, 8, (2).to_bytes(4, "little"))


def unknown_dtype(path: Path) -> None:
    patch(path, 28, b"float8\0\0")


def other_shape(path: Path) -> None:
    patch(path, 44, (1).to_bytes(8, "little"))


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@shared_only
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncated, "was cut or overwritten"), (empty, "not complete yet"),
        (foreign_magic, "is not a shared KV store"), (other_version, "layout version 2"),
        (unknown_dtype, "contradicts itself"), (other_shape, "contradicts itself"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(name, damage, sentence):
    storage = KVStorage(SHAPE, "float32", name)
    damage(shared.SHARED_DIRECTORY / name)
    with pytest.raises(ValueError, match=sentence):
        KVStorage.attach(name)
    storage.close()


def test_refusals_are_sentences():
    with pytest.raises(ValueError, match="no shared KV store named"):
        KVStorage.attach("sanderling-test-nobody-kv")
    for bad in ("", "../etc", "a/b", ".hidden", "x" * 201):
        with pytest.raises(ValueError, match="cannot name shared memory"):
            KVStorage(SHAPE, "float32", bad)
    with pytest.raises(ValueError, match="int4 takes heads of a multiple of 32 values, not of 8"):
        KVStorage(SHAPE._replace(head_dim=8), "int4")
    with pytest.raises(ValueError, match="float64 is not supported"):
        KVStorage(SHAPE, "float64")
    with pytest.raises(ValueError, match="at least 1"):
        KVStorage(SHAPE._replace(pages=0), "float32")
    for target in (None, "sanderling-test-huge-kv"):
        with pytest.raises(ValueError, match="lower engine.kv_tokens"):
            KVStorage(SHAPE._replace(pages=2**40), "float32", target)


def test_pool_copies_through_the_storage():
    storage = KVStorage(SHAPE, "float32")
    pool = PagePool(5, 4, storage)
    pages = pool.allocate(1) or []
    storage.tensor[:, :, pages[0]] = 2
    pool.retain(pages)
    copy = pool.writable(pages[0])
    assert copy != pages[0] and (storage.tensor[:, :, copy] == 2).all()
    assert np.shares_memory(pool.generation, storage.generation)
