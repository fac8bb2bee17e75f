"""Loads a model by its setting: weights for the engine, text parts for the edge.

`load_text` imports no torch, so the HTTP edge stays light. Errors are ValueErrors with one
sentence that names the file and what is accepted.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from models.load.refusal import NotForCpuError, NotForDeviceError
from models.load.text import TextModel
from models.resolve import resolve

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.decoder import Decoder
    from models.device.decoder import DeviceDecoder
    from models.load.weights import WeightSource
    from models.packed import PackedDecoder

__all__ = [
    "ACTIVATIONS",
    "DEVICE_DTYPES",
    "DTYPES",
    "NotForCpuError",
    "NotForDeviceError",
    "TextModel",
    "load_for_cpu",
    "load_for_device",
    "load_model",
    "load_text",
]

DTYPES = ("float32", "bfloat16")
DEVICE_DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("accurate", "fast", "float32")


def load_text(model: str) -> TextModel:
    """Configuration, tokenizer and chat template of a model setting (see `models.resolve`)."""
    path = resolve(model)
    if path.is_dir():
        from models.load.folder import read_text as read_folder

        return read_folder(path)
    from models.load.gguf import read_text as read_gguf
    from models.load.gguf_file import open_gguf

    return read_gguf(open_gguf(path))


def load_model(model: str, *, dtype: str = "float32", cache_dir: Path | None = None) -> "Decoder":
    """The decoder of a model setting, on the CPU, with weights in dtype and not trainable.

    cache_dir: a folder for decoded weights; later loads of the same file map them, so replicas on
    one machine share the memory. ValueError when the dtype or the files are not accepted.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not accepted; {' and '.join(DTYPES)} are.")
    import torch

    from models.load.cache import load_through
    from models.load.weights import fill

    path = resolve(model)
    config, source = _open_folder(path) if path.is_dir() else _open_gguf(path)

    def decode() -> "Decoder":
        return fill(config, source, getattr(torch, dtype), str(path))

    if cache_dir is None:
        return decode()
    return load_through(cache_dir, path, config, getattr(torch, dtype), decode)


def load_for_cpu(
    model: str,
    activations: str = "accurate",
    *,
    batch_invariant: bool = True,
    cache_dir: Path | None = None,
) -> "PackedDecoder":
    """The decoder of a GGUF file over kernels/cpu, its weights as quantised as they are stored.

    batch_invariant: see `kernels.cpu.ops`. cache_dir: as in `load_model`, for the packed weights.
    ValueError when the model is no GGUF file, or one that those kernels do not take (a
    NotForCpuError, which says why).
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations {activations!r}: {', '.join(ACTIVATIONS)} are accepted.")
    path = resolve(model)
    if path.is_dir():
        raise NotForCpuError(
            f"{path} cannot be computed with engine.kernels = 'cpu', which takes GGUF files; "
            "engine.kernels = 'reference' takes folders."
        )
    from models.load.gguf import read_config
    from models.load.gguf_file import open_gguf
    from models.load.packed import load_packed

    file = open_gguf(path)
    decoder = load_packed(file, read_config(file), activations, cache_dir)  # type: ignore[arg-type]
    decoder.batch_invariant = batch_invariant
    return decoder


def load_for_device(model: str, device: str, dtype: str = "bfloat16") -> "DeviceDecoder":
    """The decoder of a model setting on a device ("cpu", "cuda" or "cuda:N"), computing in dtype.

    Weights of a GGUF file stay as quantised as they are stored where `kernels/triton` has a product
    for their format; all others are kept in dtype. ValueError as `models.device.place.open_device`
    and the loaders have it, and a NotForDeviceError for a model that the kernels do not take.
    """
    if dtype not in DEVICE_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not accepted; {', '.join(DEVICE_DTYPES)} are.")
    import torch

    from models.device.place import open_device
    from models.load.device import load_on_device

    place = open_device(device)
    path = resolve(model)
    config, source = _open_folder(path) if path.is_dir() else _open_gguf(path)
    return load_on_device(config, source, place, getattr(torch, dtype), path)


def _open_folder(path: Path) -> "tuple[ModelConfig, WeightSource]":
    from models.load.folder import open_folder

    return open_folder(path)


def _open_gguf(path: Path) -> "tuple[ModelConfig, WeightSource]":
    from models.load.gguf import read_config
    from models.load.gguf_file import open_gguf
    from models.load.gguf_weights import GGUFWeights

    file = open_gguf(path)
    config = read_config(file)
    return config, GGUFWeights(file, config)
