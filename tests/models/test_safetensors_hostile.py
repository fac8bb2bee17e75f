"""Damaged safetensors files load or are refused with a sentence; no process dies of them."""

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from models.load.safetensors_weights import SafetensorsWeights

GOOD = save({"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)})
(HEADER,) = struct.unpack("<Q", GOOD[:8])


def mutated(seed: int) -> bytes:
    """Cut, with bytes changed, or with a header that says something else."""
    chance, data = random.Random(seed), bytearray(GOOD)
    kind = seed % 4
    if kind == 0:
        return bytes(data[: chance.randrange(len(data))])
    if kind == 1:
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data)
    header = json.loads(GOOD[8 : 8 + HEADER])
    name = chance.choice(["a", "b"])
    if kind == 2:
        header[name][chance.choice(["shape", "data_offsets"])] = [
            chance.choice([-1, 0, 3, 1 << 20, 1 << 62, (1 << 64) - 1]) for _ in range(2)
        ]
    else:
        header[name]["dtype"] = chance.choice(["F64", "I4", "", "F" * 500, None, 7])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + GOOD[8 + HEADER :]


@pytest.mark.parametrize("seed", range(160))
def test_it_loads_or_is_refused(tmp_path: Path, seed: int):
    (tmp_path / "model.safetensors").write_bytes(mutated(seed))
    try:
        weights = SafetensorsWeights(tmp_path)
        for name in weights.home:
            shape = weights.shape(name)
            assert np.prod(shape) <= len(GOOD)
            weights.read(name, torch.empty(shape))
    except ValueError as error:
        assert str(error).endswith("."), error


def test_the_untouched_file_loads(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    weights = SafetensorsWeights(tmp_path)
    out = torch.empty(weights.shape("a"))
    weights.read("a", out)
    assert out.flatten().tolist() == list(range(12))
