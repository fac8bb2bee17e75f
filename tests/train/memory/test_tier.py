"""Files as memory: what comes back, when it moves, and how it is told."""

from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from tests.train import tiny
from train.memory.segments import BLOCK, lay_out
from train.memory.tier import ALIGNED, Tier
from train.model import Llama
from train.weights import read_start

KINDS = {"param": torch.bfloat16, "gradient": torch.float32}


def config() -> ModelConfig:
    return read_start(tiny.job()).config


@pytest.fixture
def tier(tmp_path: Path):
    made = Tier(tmp_path, lay_out(config(), 600).elements, KINDS)
    yield made
    made.close()


@pytest.mark.parametrize("tile_elements", [600, 4096, 1 << 30])
def test_every_parameter_has_its_stretch(tile_elements: int):
    layout = lay_out(config(), tile_elements)
    with torch.device("meta"):
        model = Llama(config())
    assert {s.name: s.shape for s in layout.slots} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    stretches = sorted((slot.start, slot.stop) for slot in layout.slots)
    assert all(
        stop <= start for (_, stop), (start, _) in zip(stretches, stretches[1:], strict=False)
    )
    assert all(segment.start % BLOCK == 0 for segment in layout.segments)
    starts = [segment.start + segment.padded for segment in layout.segments]
    assert starts[:-1] == [segment.start for segment in layout.segments[1:]]
    elements = sum(segment.elements for segment in layout.segments)
    assert elements == sum(p.numel() for p in model.parameters())


def test_what_is_put_is_taken_and_mapped(tier: Tier):
    segments = lay_out(config(), 600).segments
    for segment in segments:
        buffer = tier.buffer("gradient", segment)
        assert buffer.data_ptr() % ALIGNED == 0
        tier.put("gradient", segment, buffer.fill_(segment.number + 1))
    for segment in segments:  # some still under way
        tier.hint("gradient", segment)
        found = tier.take("gradient", segment)
        assert found.shape == (segment.padded,) and bool((found == segment.number + 1).all())
        tier.release(found)
    flat = tier.mapped("gradient")
    for segment in segments:
        part = flat[segment.start : segment.start + segment.padded]
        assert bool((part == segment.number + 1).all())
    flat.fill_(-1)
    del flat
    tier.flush()
    assert bool((tier.take("gradient", segments[-1]) == -1).all())


def test_bytes_are_counted(tier: Tier):
    segment = lay_out(config(), 600).layers[0]
    tier.put("param", segment, tier.buffer("param", segment).zero_())
    tier.settle()
    tier.release(tier.take("param", segment))
    assert (tier.read_bytes, tier.written_bytes) == (2 * segment.padded, 2 * segment.padded)
    assert [(span.kind, span.write) for span in tier.spans] == [("param", True), ("param", False)]


def test_files_go_with_the_process(tier: Tier):
    assert list(tier.folder.iterdir()) == []


def test_a_file_system_without_direct_transfers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Plain reads and writes then, and `direct` says so."""
    monkeypatch.setattr("train.memory.tier._direct_works", lambda _: False)
    made = Tier(tmp_path, BLOCK * 8, {"param": torch.float32})
    segment = lay_out(config(), 600).segments[0]
    made.put("param", segment, made.buffer("param", segment).fill_(3))
    assert bool((made.take("param", segment) == 3).all()) and not made.direct
    made.close()


def test_a_missing_folder_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Tier(tmp_path / "file", BLOCK, KINDS)
