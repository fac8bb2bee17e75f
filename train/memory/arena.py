"""The device of ZeRO-Offload, and the link to it, as counters.

On a machine without an accelerator both tiers are the same memory. What is counted here is what
would be held on a device, and what would cross the link: that part of offloading is simulated.
Where the host tier lies is real: plain memory, or files that are mapped.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class Arena:
    """Bytes on the device by what they are, the most there ever were, and bytes over the link."""

    held: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    to_host_bytes: int = 0
    to_device_bytes: int = 0

    def hold(self, what: str, count: int) -> None:
        """`what` takes so many bytes from now on; 0 frees it."""
        self.held[what] = count
        self.peak_bytes = max(self.peak_bytes, sum(self.held.values()))


class Host:
    """Host memory. folder: files that are mapped there, which do not count as this process' own
    memory and may be written out; None: plain memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def zeros(self, name: str, elements: int, dtype: torch.dtype) -> Tensor:
        """(elements,) zeros. A file has no name left, so that it goes with the process."""
        if self.folder is None:
            return torch.zeros(elements, dtype=dtype)
        with tempfile.NamedTemporaryFile(prefix=f"{name}-", dir=self.folder) as file:
            file.truncate(elements * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=elements, dtype=dtype)
