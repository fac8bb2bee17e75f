"""What computes, where and in which number format: the engine's settings against this machine.

Called by `serve.build`, once for each replica, where torch is imported already.
"""

import logging
from typing import NamedTuple

from cluster.settings import Settings

log = logging.getLogger(__name__)


class Computing(NamedTuple):
    """kernels: "triton", "cpu", "reference", or "auto" for the CPU kernels where they take the
    model. device: as torch names it. dtype: never "auto"."""

    kernels: str
    device: str
    dtype: str


def computing(settings: Settings) -> Computing:
    """ValueError where the settings ask for a GPU's number format and there is no GPU."""
    options = settings.engine
    if options.kernels == "triton" or options.device.startswith("cuda"):
        return on_device(settings)
    if options.kernels == "auto" and options.device == "auto" and _has_gpu():
        log.info("engine.kernels = 'auto' takes triton: torch finds a GPU")
        return on_device(settings)
    return on_cpu(settings)


def on_device(settings: Settings) -> Computing:
    """As engine.kernels = 'triton' would have it."""
    options = settings.engine
    device = "cuda" if options.device == "auto" else options.device
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return Computing("triton", device, dtype)


def on_cpu(settings: Settings) -> Computing:
    """As without a GPU. ValueError for what only a GPU has."""
    options = settings.engine
    if options.dtype == "float16":
        raise ValueError(
            "engine.dtype = 'float16' is only for GPUs, and torch finds none here; 'float32' and "
            "'bfloat16' are accepted"
        )
    kernels = options.kernels
    if options.dtype == "bfloat16":
        kernels = "reference"
    return Computing(kernels, "cpu", "float32" if options.dtype == "auto" else options.dtype)


def _has_gpu() -> bool:
    from models.device.place import has_gpu

    return has_gpu()
