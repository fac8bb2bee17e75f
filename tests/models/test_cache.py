"""Decoded weights that replicas share: the same values, written once, whole or not at all."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from models.decoder import Decoder
from models.load import load_model
from tests.models.sequences import Sequences


def test_mapped_weights_are_the_decoded_ones(tiny_gguf: Path, tmp_path: Path):
    for dtype in ("float32", "bfloat16"):
        plain = load_model(str(tiny_gguf), dtype=dtype)
        for _ in range(2):
            mapped = load_model(str(tiny_gguf), dtype=dtype, cache_dir=tmp_path)
            pairs = zip(plain.named_parameters(), mapped.parameters(), strict=True)
            for (name, wanted), found in pairs:
                assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
                assert found.data_ptr() % 64 == 0
        logits = [Sequences(d, 1, 32).step([(0, [5, 6, 7])]) for d in (plain, mapped)]
        assert torch.equal(*logits)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_load_decodes_nothing(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load_model(str(tiny_gguf), cache_dir=tmp_path)
    monkeypatch.setattr("models.load.weights.fill", None)
    load_model(str(tiny_gguf), cache_dir=tmp_path)
    with pytest.raises(TypeError):
        load_model(str(tiny_gguf), cache_dir=tmp_path / "other")


def test_a_changed_checkpoint_is_decoded_again(tiny_gguf: Path, tmp_path: Path):
    copy = Path(shutil.copy(tiny_gguf, tmp_path / "copy.gguf"))
    cache = tmp_path / "cache"
    load_model(str(copy), cache_dir=cache)
    os.utime(copy, ns=(1, 1))
    load_model(str(copy), cache_dir=cache)
    assert len(list(cache.iterdir())) == 2


def test_writing_to_mapped_weights_stays_private(tiny_gguf: Path, tmp_path: Path):
    first = load_model(str(tiny_gguf), cache_dir=tmp_path)
    before = first.norm.weight.clone()
    first.norm.weight.data.zero_()
    second = load_model(str(tiny_gguf), cache_dir=tmp_path)
    assert torch.equal(second.norm.weight, before)


def test_the_first_of_several_writers_stays(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another process finishes while we decode: its file is the one we map."""
    from models.load import weights

    decode = weights.fill
    inodes: list[int] = []

    def late(*arguments: object) -> Decoder:
        monkeypatch.setattr(weights, "fill", decode)
        load_model(str(tiny_gguf), cache_dir=tmp_path)
        inodes.extend(file.stat().st_ino for file in tmp_path.iterdir())
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "fill", late)
    load_model(str(tiny_gguf), cache_dir=tmp_path)
    assert [file.stat().st_ino for file in tmp_path.iterdir()] == inodes


def test_a_file_of_another_size_is_refused(tiny_gguf: Path, tmp_path: Path):
    load_model(str(tiny_gguf), cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="delete it"):
        load_model(str(tiny_gguf), cache_dir=tmp_path)


def test_a_folder_that_cannot_be_written_is_a_sentence(tiny_gguf: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot hold decoded weights"):
        load_model(str(tiny_gguf), cache_dir=tmp_path / "file" / "cache")
