"""What a model consists of, as a GGUF file has it: lines of metadata, and tensors by GGUF's names.

A GGUF file is taken as it is. A Hugging Face folder is described anew: its shape in GGUF's keys,
its tokenizer.json whole under `tokenizer.huggingface.json`, query and key rows in the order of the
architecture. Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from kernels.reference.dequantize import dequantize
from models.load.folder import open_folder, read_text
from models.load.gguf import ARCHITECTURES, read_config, stored_name
from models.load.gguf_file import GGUFFile, open_gguf
from models.load.weights import WeightSource, checked_parts
from models.save.describe import Entry, describe, rotary_factors

REWRITTEN = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
)
"""Keys that are about a file's storage, not about its model; the writer has its own."""


class Tensor(NamedTuple):
    """One tensor: GGUF's name, shape with the row length last, and the block format that `stored`
    gives."""

    name: str
    shape: tuple[int, ...]
    form: str


class Source(Protocol):
    """A model that can be written. name: for people; bytes: of its weights' files."""

    name: str
    architecture: str
    metadata: list[Entry]
    tensors: list[Tensor]
    bytes: int

    def stored(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The blocks of a tensor as they are, without rounding."""
        ...

    def values(self, tensor: Tensor) -> NDArray[np.float32]:
        """A tensor in float32, in the order of `stored`."""
        ...


def open_source(path: Path) -> Source:
    """The model of a .gguf file or a folder. ValueError as the loaders have it."""
    return FolderSource(path) if path.is_dir() else FileSource(path)


class FileSource:
    """A GGUF file, see `Source`."""

    def __init__(self, path: Path) -> None:
        self._file: GGUFFile = open_gguf(path)  # checks every length, so the library may read on
        read_config(self._file)
        self.name = str(path)
        self.architecture = str(self._file.metadata["general.architecture"])
        self.metadata = _entries(path)
        self.tensors = [Tensor(n, t.shape, t.format.name) for n, t in self._file.tensors.items()]
        self.bytes = path.stat().st_size

    def stored(self, tensor: Tensor) -> NDArray[np.uint8]:
        """See `Source`."""
        return np.frombuffer(self._file.stored_bytes(tensor.name), dtype=np.uint8)

    def values(self, tensor: Tensor) -> NDArray[np.float32]:
        """See `Source`."""
        decoded = torch.empty(tensor.shape, dtype=torch.float32)
        dequantize(torch.from_numpy(self.stored(tensor)), tensor.form, decoded)
        values: NDArray[np.float32] = decoded.numpy()
        return values


def _entries(path: Path) -> list[Entry]:
    """All lines of metadata that are about the model, with the types that they have."""
    found = []
    for key, field in gguf.GGUFReader(path).fields.items():
        if key.startswith("GGUF.") or key in REWRITTEN:
            continue
        kind, *of = field.types
        value = field.contents()
        if kind == gguf.GGUFValueType.ARRAY and not value:
            continue  # the writer has no way to say "no items", which a missing key says, too
        found.append(Entry(key, value, kind, of[-1] if of else None))
    return found


class FolderSource:
    """A Hugging Face folder, see `Source`. All its tensors count as float32."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._config, self._weights = open_folder(path)
        text = read_text(path)
        self.architecture = "qwen2" if self._config.qkv_bias and not self._config.out_bias else ""
        self.architecture = self.architecture or "llama"
        self.metadata = describe(self.name, self.architecture, text)
        self._names: dict[str, str] = {}
        self._factors = rotary_factors(self._config)
        self.tensors = list(self._tensors())
        self.bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))

    def _tensors(self) -> list[Tensor]:
        found = []
        source: WeightSource = self._weights
        for part in checked_parts(self._config, source, self.name):
            name = stored_name(part.source)
            self._names[name] = part.source
            shape = (part.rows,) if part.columns is None else (part.rows, part.columns)
            found.append(Tensor(name, shape, "F32"))
        if self._factors is not None:
            found.append(Tensor("rope_freqs.weight", self._factors.shape, "F32"))
        return found

    def stored(self, tensor: Tensor) -> NDArray[np.uint8]:
        """See `Source`."""
        return self.values(tensor).view(np.uint8).reshape(-1)

    def values(self, tensor: Tensor) -> NDArray[np.float32]:
        """See `Source`."""
        if tensor.name == "rope_freqs.weight" and self._factors is not None:
            return self._factors
        name = self._names[tensor.name]
        read = torch.empty(tensor.shape, dtype=torch.float32)
        self._weights.read(name, read)
        values: NDArray[np.float32] = read.numpy()
        heads = {"q_proj": self._config.heads, "k_proj": self._config.kv_heads}
        part = name.split(".")[-2]
        if part in heads and ARCHITECTURES[self.architecture].interleaved:
            return interleaved(values, heads[part])
        return values


def interleaved(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from half-split order (i, i + d/2) to rotary pairs (2i, 2i + 1)."""
    halves = np.arange(values.shape[0]).reshape(heads, 2, -1)
    return np.ascontiguousarray(values[halves.swapaxes(1, 2).reshape(-1)])
