"""Opens the device of `engine.device`, or says what is missing.

Called by `models.load.device` before a weight is read. Errors are ValueErrors with one sentence.
"""

from importlib.util import find_spec

import torch


def has_gpu() -> bool:
    """Whether torch finds a GPU that it can use."""
    return torch.cuda.is_available()


def open_device(name: str) -> torch.device:
    """name: "cpu", "cuda" or "cuda:N" (ROCm's devices have that name in torch, too).

    ValueError when there is no such device, no driver, no Triton, or a GPU that the kernels were
    never compiled for.
    """
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "finds no GPU with a driver" if built else "is built for CPUs only"
        raise ValueError(
            f"engine.device = {name!r} needs a GPU, and this torch ({torch.__version__}) {why}; "
            "engine.device = 'cpu' is accepted here"
        )
    device = torch.device(name if ":" in name else "cuda:0")
    count = torch.cuda.device_count()
    if device.index >= count:
        names = ", ".join(f"'cuda:{index}'" for index in range(count))
        raise ValueError(f"engine.device = {name!r}: there are {count} GPUs; {names} are accepted")
    if find_spec("triton") is None:
        raise ValueError(
            f"engine.device = {name!r} needs the module triton, which is not installed; install "
            "the release of it that torch was built with"
        )
    _in_catalogue(device)
    return device


def _in_catalogue(device: torch.device) -> None:
    from kernels.triton.launch import target_of

    try:
        target_of("engine.device", torch.empty(1, device=device))
    except (RuntimeError, ValueError) as refusal:
        card = torch.cuda.get_device_name(device)
        raise ValueError(
            f"engine.device = {str(device)!r} ({card}) is refused: {refusal}"
        ) from None
