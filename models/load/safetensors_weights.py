"""Safetensors files as a source of weights: one file, or shards with an index.

Tensors are mapped and copied straight into the decoder's memory. Header and offsets are checked
by the safetensors library before anything is read.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from models.load.folder import read_json

ACCEPTED = {"F64", "F32", "F16", "BF16"}


class SafetensorsWeights:
    """See `WeightSource`. Files stay mapped for as long as this object lives."""

    def __init__(self, path: Path) -> None:
        """ValueError when the folder has no safetensors, or an index that leaves it or names
        files that are not there."""
        self.path = path
        index = path / "model.safetensors.index.json"
        single = path / "model.safetensors"
        self.files: dict[Path, Any] = {}
        if index.is_file():
            self.home = self._read_index(index)
        elif single.is_file():
            self.home = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise ValueError(
                f"{path} has no model.safetensors and no model.safetensors.index.json; other "
                "weight files are not accepted."
            )

    def _read_index(self, index: Path) -> dict[str, Path]:
        fields = read_json(index)
        mapping = fields.values.get("weight_map")
        if not isinstance(mapping, dict):
            raise fields.refuse("weight_map", "an object")
        home = {}
        for name, file in mapping.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(
                    f"{index}: weight_map must name files of the folder, got {file!r}."
                )
            home[name] = self.path / file
        return home

    def _open(self, file: Path) -> Any:
        if file not in self.files:
            try:
                self.files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is not a safetensors file: {error}.") from None
        return self.files[file]

    def _slice(self, name: str) -> Any:
        if name not in self.home:
            raise ValueError(f"{self.path}: tensor {name!r} is missing.")
        file = self.home[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError:
            raise ValueError(f"{file}: tensor {name!r} is missing.") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape. ValueError when the tensor is missing or not floating-point."""
        stored = self._slice(name)
        if stored.get_dtype() not in ACCEPTED:
            known = ", ".join(sorted(ACCEPTED))
            raise ValueError(
                f"{self.path}: tensor {name!r} has dtype {stored.get_dtype()}; {known} are read."
            )
        return tuple(stored.get_shape())

    def read(self, name: str, out: torch.Tensor) -> None:
        """Copies the tensor into out, converting its dtype."""
        out.copy_(self._slice(name)[:])
