"""Decoded weights in a file that every replica on a machine maps.

Decoding a quantised file gives each process a private copy, several times the size of the file. A
mapped copy lies once in the page cache, however many replicas read it, and a replica that starts
later starts faster. The file is raw: all parameters in the decoder's own order, each on a 64-byte
boundary; its name fixes the layout. Old files are never deleted here; the folder is a cache.
"""

import contextlib
import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from models.config import ModelConfig
from models.decoder import Decoder

LAYOUT_VERSION = 1
ALIGNMENT_BYTES = 64


def load_through(
    cache_dir: Path,
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    decode: Callable[[], Decoder],
) -> Decoder:
    """The decoder of `path`, mapped from cache_dir; decode() is called once to put it there.

    The weights are mapped privately: what a process writes to them, others never see. ValueError
    when the folder cannot be written.
    """
    file = cache_dir / cache_name(path, config, dtype)
    if not file.is_file():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            store(file, (parameter.data for parameter in decode().parameters()))
            trim()
        except OSError as error:
            raise ValueError(f"{cache_dir} cannot hold decoded weights: {error}.") from None
    return _map(file, config, dtype)


def trim() -> None:
    """Give the decoded copy's memory back: glibc keeps what a thread of a process freed, and a
    replica that decoded would stay hundreds of MB larger than those that map."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def cache_name(path: Path, config: ModelConfig, dtype: torch.dtype) -> str:
    """Changes with the checkpoint's files (name, size, time of change), the shape of the decoder,
    the dtype and the layout."""
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    facts = (str(path.resolve()), stats, config, dtype, LAYOUT_VERSION)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    return f"{path.stem}-{str(dtype).removeprefix('torch.')}-{digest[:16]}.weights"


def store(file: Path, pieces: Iterable[torch.Tensor]) -> None:
    """Writes contiguous tensors one after the other, each on a boundary of ALIGNMENT_BYTES.

    Appears whole or not at all. When several processes write at once the first one's file stays, so
    that all of them map the same.
    """
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as out:
            for piece in pieces:
                out.write(bytes(-out.tell() % ALIGNMENT_BYTES))
                out.write(piece.view(-1).view(torch.uint8).numpy().data)
        with contextlib.suppress(FileExistsError):
            os.link(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def mapped(file: Path, sizes_bytes: Sequence[int]) -> list[torch.Tensor]:
    """The uint8 tensors that `store` wrote, mapped privately. ValueError for a file of another
    size."""
    starts, end = [], 0
    for size in sizes_bytes:
        starts.append(end + -end % ALIGNMENT_BYTES)
        end = starts[-1] + size
    if file.stat().st_size != end:
        raise ValueError(f"{file} is not what was written there; delete it and start again.")
    data = torch.from_file(str(file), shared=False, size=end, dtype=torch.uint8)
    return [data[start : start + size] for start, size in zip(starts, sizes_bytes, strict=True)]


def _map(file: Path, config: ModelConfig, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(config).requires_grad_(False).eval()
    parameters = list(decoder.parameters())
    pieces = mapped(file, [p.numel() * dtype.itemsize for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = piece.view(dtype).view(parameter.shape)
    return decoder
