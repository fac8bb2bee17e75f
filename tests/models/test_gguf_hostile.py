"""GGUF files that are wrong by accident or on purpose: a sentence, never anything else."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.load import load_model, load_text
from models.load.gguf_file import open_gguf
from tests.models.sequences import Sequences
from tests.models.tiny import write_byte_level, write_sentencepiece


def loads(path: Path) -> bool:
    """Whether both halves load; a ValueError is a refusal, anything else is a failure."""
    try:
        load_text(str(path))
        load_model(str(path))
    except ValueError as error:
        assert len(str(error)) > 20
        return False
    return True


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "tiny.gguf"
    write = write_byte_level if request.param == "bytes" else write_sentencepiece
    return write(path).read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad") / "bad.gguf"


def test_the_untouched_file_loads(good: bytes, path: Path):
    path.write_bytes(good)
    assert loads(path)


@given(data=st.data())
@settings(max_examples=150)
def test_truncated_files_are_refused(good: bytes, path: Path, data: st.DataObject):
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    assert not loads(path)


@given(data=st.data())
@settings(max_examples=250)
def test_damaged_files_load_or_are_refused(good: bytes, path: Path, data: st.DataObject):
    """Bytes overwritten, most of them before the tensors, where the structure is."""
    raw = bytearray(good)
    table = raw.index(b"blk.1.ffn_down.weight") + 60
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, data.draw(st.sampled_from([table, table, len(raw) - 1]))))
        patch = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", 1 << 62)]),
            )
        )
        raw[at : at + len(patch)] = patch
    path.write_bytes(bytes(raw))
    loads(path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(dimensions: list[int], kind: int, offset: int = 0) -> bytes:
    shape = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    size = struct.pack("<I", len(dimensions))
    return text("weight") + size + shape + struct.pack("<IQ", kind, offset) + bytes(64)


WRONG = {
    "empty": (b"", "does not begin with"),
    "another format": (b"PK\x03\x04" + bytes(60), "does not begin with"),
    "old version": (header(0, 0, version=1), "version is 1, accepted are 2 and 3"),
    "big-endian": (header(0, 0, version=3 << 24), "little-endian"),
    "endless metadata": (header(0, 1 << 60), "truncated"),
    "endless tensors": (header(1 << 60, 0), "truncated"),
    "endless key": (header(0, 1) + struct.pack("<Q", 1 << 62), "truncated"),
    "endless string": (header(0, 1) + text("a") + struct.pack("<IQ", 8, 1 << 62), "truncated"),
    "endless array": (header(0, 1) + text("a") + struct.pack("<IIQ", 9, 4, 1 << 62), "truncated"),
    "endless words": (header(0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 1 << 62), "truncated"),
    "deep arrays": (
        header(0, 1) + text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50,
        "value type 9",
    ),
    "unknown value": (header(0, 1) + text("a") + struct.pack("<I", 77), "value type 77"),
    "key twice": (header(0, 2) + (text("a") + struct.pack("<IB", 0, 1)) * 2, "twice"),
    "key that is no text": (header(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe", "UTF-8"),
    "no dimensions": (header(1, 0) + tensor([], 0), "0 dimensions"),
    "huge tensor": (header(1, 0) + tensor([1 << 40, 1 << 20], 0), "ends past the end"),
    "wrapping tensor": (header(1, 0) + tensor([1 << 32, 1 << 32], 0), "ends past the end"),
    "empty tensor": (header(1, 0) + tensor([0], 0), "not empty"),
    "broken rows": (header(1, 0) + tensor([33], 3), "multiples of 32"),
    "unknown blocks": (header(1, 0) + tensor([32], 10), "number 10, accepted are F32, F16, Q4_0"),
    "crooked": (header(1, 0) + tensor([1], 0, offset=3), "not aligned"),
    "no architecture": (header(0, 0), "architecture '' is not accepted; 'llama' and 'qwen2'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_structures_are_refused_with_a_sentence(path: Path, case: str):
    raw, words = WRONG[case]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=words) as refusal:
        load_text(str(path))
    assert str(path) in str(refusal.value)


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    assert len(old) == len(new)
    return lambda raw: raw.replace(old, new)


MEANINGS = {
    "foreign architecture": (replaced(b"llama", b"mamba"), "'mamba' is not accepted"),
    "missing tensor": (replaced(b"blk.1.ffn_up", b"blk.7.ffn_up"), "blk.1.ffn_up.weight.*missing"),
    "missing key": (replaced(b"head_count\x04", b"tail_count\x04"), "attention.head_count must be"),
    "unknown tokenizer": (replaced(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert"), "'bert'"),
    "wrong shape": (
        replaced(
            b"ffn_norm.weight" + struct.pack("<IQ", 1, 64),
            b"ffn_norm.weight" + struct.pack("<IQ", 1, 32),
        ),
        r"has shape \(32,\), \(64,\) is wanted",
    ),
    "broken template": (replaced(b"{% endfor %}", b"{% endxxx %}"), "not valid jinja"),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_wrong_meanings_are_refused_with_a_sentence(tiny_gguf: Path, path: Path, case: str):
    change, words = MEANINGS[case]
    path.write_bytes(change(tiny_gguf.read_bytes()))
    assert path.read_bytes() != tiny_gguf.read_bytes()
    with pytest.raises(ValueError, match=words) as refusal:
        load_text(str(path))
        load_model(str(path))
    assert str(path) in str(refusal.value)


def test_reading_a_tensor_never_writes_to_the_file(tiny_gguf: Path):
    before = tiny_gguf.read_bytes()
    view = open_gguf(tiny_gguf).stored_bytes("token_embd.weight")
    view[:4] = b"\x01\x02\x03\x04"
    assert tiny_gguf.read_bytes() == before


def test_qwen2_rows_are_not_reordered(tmp_path: Path, tiny_gguf: Path):
    """The same weights under an architecture that stores half-split rows: other logits."""
    ids = list(range(40))
    other = write_byte_level(tmp_path / "other.gguf", architecture="qwen2")
    llama = Sequences(load_model(str(tiny_gguf)), 1, 64).step([(0, ids)])
    qwen2 = Sequences(load_model(str(other)), 1, 64).step([(0, ids)])
    assert not torch.allclose(llama[5:], qwen2[5:], atol=1e-2)
