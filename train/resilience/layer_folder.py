"""Checkpoints by layer in a local folder: whoever needs a layer reads that layer, so a checkpoint
of any number of stages starts any other.

    step-00000012/part-00001.safetensors    what one rank wrote: "<kind>/<parameter>" tensors
    step-00000012/manifest.json             step, samples, the parts; renamed into place last

A folder without a manifest is no checkpoint.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class LayerCheckpoint:
    """A whole one. samples: consumed until then."""

    path: Path
    step: int
    samples: int
    parts: tuple[str, ...]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of its tensors; KeyError for a name that it does not have."""
        wanted, found = set(names), {}
        for part in self.parts:
            with safe_open(self.path / part, framework="pt") as file:
                for name in wanted & set(file.keys()):
                    found[name] = file.get_tensor(name)
        if missing := wanted - set(found):
            raise KeyError(f"{self.path}: no {', '.join(sorted(missing))}")
        return found


class LayerFolder:
    """Writes and finds them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, step: int, rank: int, tensors: dict[str, Tensor]) -> None:
        """One rank's part, on disk when it returns."""
        folder = self._folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"part-{rank:05}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def commit(self, step: int, samples: int, size: int) -> None:
        """Makes it whole, once all `size` ranks have written."""
        parts = [f"part-{rank:05}.safetensors" for rank in range(size)]
        waiting = self._folder(step) / f"{MANIFEST}.partial"
        with waiting.open("w") as file:
            json.dump({"step": step, "samples": samples, "parts": parts}, file)
            file.flush()
            os.fsync(file.fileno())
        waiting.rename(waiting.with_name(MANIFEST))

    def newest(self) -> LayerCheckpoint | None:
        """The whole one of the highest step."""
        for path in sorted(self.root.glob(f"step-*/{MANIFEST}"), reverse=True):
            told = json.loads(path.read_text())
            return LayerCheckpoint(path.parent, told["step"], told["samples"], tuple(told["parts"]))
        return None

    def _folder(self, step: int) -> Path:
        return self.root / f"step-{step:08}"
