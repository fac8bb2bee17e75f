"""The KV cache of one replica in a GPU's memory, as the Triton kernels want it.

What KVStorage is for a CPU: it owns the memory and the generation numbers of its pages. Nobody
else can map that memory, so pages leave it through the host's: with a name there is a KVStorage of
that name beside it, which `lend` fills, page by page, for others to map.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.kv_planes import KVPlanes, planes
from models.device.step import Cache
from serve.kv.storage import KVShape, KVStorage


class DeviceStorage:
    """`cache.numbers[l, 0]` are layer l's keys (after RoPE), `[l, 1]` its values; scales likewise.

    kv_format: a name in kernels.kv_planes. Zero-filled at first. `generation` is int64 [pages], in
    host memory, written by the PagePool above. On the host a page is as KVStorage has it: a head's
    scales stand behind its numbers.
    """

    def __init__(
        self, shape: KVShape, kv_format: str, device: torch.device, name: str | None = None
    ) -> None:
        """ValueError for a format or a size that cannot be, or that the device has no room for."""
        if min(shape) < 1:
            raise ValueError(f"Every size of a KV cache must be at least 1; got {shape}.")
        kept = planes(kv_format, shape.head_dim)
        self.name = name
        self.shape = shape
        self.kv_format = kv_format
        self.token_bytes = token_bytes(shape, kept)
        try:
            self._cache: Cache | None = _allocated(shape, kept, device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            size = shape.pages * shape.page_tokens * self.token_bytes
            raise ValueError(
                f"The KV cache needs {size:,} bytes of {device}'s memory, which are not to be had: "
                f"lower engine.kv_tokens ({str(error).splitlines()[0]})."
            ) from None
        self._lent = None if name is None else KVStorage(shape, kv_format, name)
        self.generation: NDArray[np.int64] = (
            np.zeros(shape.pages, np.int64) if self._lent is None else self._lent.generation
        )

    @property
    def cache(self) -> Cache:
        """Not after `close`."""
        assert self._cache is not None, "the KV storage is closed"
        return self._cache

    def copy_page(self, source: int, target: int) -> None:
        """Copies K and V of every layer of page `source` over page `target`."""
        for plane in self.cache:
            if plane is not None:
                plane[:, :, target].copy_(plane[:, :, source])

    def lend(self, pages: Sequence[int]) -> None:
        """Copies pages to the shared memory of this name, under the same numbers."""
        assert self._lent is not None, "only a storage with a name lends pages"
        self._lent.tensor[:, :, list(pages)] = self.to_host(pages)

    def to_host(self, pages: Sequence[int]) -> torch.Tensor:
        """[layers, 2, pages, page_tokens, kv_heads, elements] of KVStorage's type: a copy."""
        numbers, scales = (
            None if plane is None else plane[:, :, list(pages)] for plane in self.cache
        )
        assert numbers is not None
        if self.kv_format == "int4":
            return _side_by_side(numbers, 2).cpu()
        if scales is None:
            return numbers.cpu()
        behind = scales[..., None].view(torch.uint8)
        return torch.cat((numbers.view(torch.uint8), behind), dim=-1).cpu()

    def from_host(self, stored: torch.Tensor, pages: Sequence[int]) -> None:
        """The reverse of `to_host`, into these pages."""
        numbers, scales = self.cache
        moved, chosen = stored.to(numbers.device), list(pages)
        if scales is None:
            if self.kv_format == "int4":
                moved = _side_by_side(moved, moved.shape[-1] // 20)
            numbers[:, :, chosen] = moved
            return
        width = numbers.shape[-1]
        numbers[:, :, chosen] = moved[..., :width].contiguous().view(numbers.dtype)
        behind = moved[..., width:].contiguous().view(scales.dtype)
        scales[:, :, chosen] = behind.view(moved.shape[:5])

    def close(self) -> None:
        """Lets go of the memory, and of what was lent. Idempotent."""
        self._cache = None
        if self._lent is not None:
            self._lent.close()


def _side_by_side(stored: torch.Tensor, parts: int) -> torch.Tensor:
    """A copy of a cache in int4 whose scales stand in another order: the scales of a head in
    `parts` runs give way to the first of each run, the second of each, and so on.

    The CPU kernels have a group's two scales side by side, `Cache` those of values, then of keys.
    """
    nibble_bytes = stored.shape[-1] * 4 // 5
    moved = stored.clone()
    behind = stored[:, 1, ..., nibble_bytes:].contiguous().view(torch.float16)
    turned = torch.unflatten(behind, -1, (parts, -1)).transpose(-1, -2).flatten(-2)
    moved[:, 1, ..., nibble_bytes:] = turned.contiguous().view(torch.uint8)
    return moved


def token_bytes(shape: KVShape, kept: KVPlanes) -> int:
    """Bytes of K and V of one token over all layers, scales and all."""
    size = kept.number_count * getattr(torch, kept.numbers).itemsize
    if kept.scales:
        size += math.prod(kept.scale_shape) * getattr(torch, kept.scales).itemsize
    return int(2 * shape.layers * shape.kv_heads * size)


def _allocated(shape: KVShape, kept: KVPlanes, device: torch.device) -> Cache:
    heads = (shape.layers, 2, shape.pages, shape.page_tokens, shape.kv_heads)
    numbers = torch.zeros(
        *heads, kept.number_count, dtype=getattr(torch, kept.numbers), device=device
    )
    if not kept.scales:
        return Cache(numbers)
    dtype = getattr(torch, kept.scales)
    return Cache(numbers, torch.zeros(*heads, *kept.scale_shape, dtype=dtype, device=device))


Storage = KVStorage | DeviceStorage
"""Where a replica's pages are."""
