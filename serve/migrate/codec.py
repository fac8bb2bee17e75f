"""Pages of floats as fewer bytes: int8 or int4 with scales, for the crossing alone.

The receiver turns them back into its own format, with bits lost, so this is used only where
`migrate.lossy` allows it. A head takes D bytes and a float32 scale in int8; in int4 half a byte for
each value and a float16 scale for each group of 32 (of the whole head where that is no multiple).
Symmetric, largest magnitude first: the error of a value is at most half its scale. KV that is int8
or int4 already needs none of this and crosses as it is.
"""

import torch
from torch import Tensor

from kernels.kv_formats import GROUP
from serve.kv.device import DeviceStorage, Storage
from serve.kv.storage import KVShape, sizes, stored_dtype
from serve.migrate.plan import Carried
from serve.transport.contract import Offer, check_format
from serve.transport.copy import receive

FLOATS = ("float32", "float16", "bfloat16")
_NAMES = {"int8": "codec/int8", "int4": "codec/int4"}
_TOP = {"int8": 127.0, "int4": 7.0}


def choices(kv_format: str) -> tuple[Carried, ...]:
    """The codecs that make pages of this format smaller."""
    return ("int8", "int4") if kv_format in FLOATS else ()


def token_bytes(shape: KVShape, choice: Carried) -> int:
    """Bytes of K and V of one token over all layers, as they cross; whole pages do."""
    return 2 * shape.layers * shape.kv_heads * _head_bytes(shape.head_dim, choice)


def offer(
    lease_id: str, storage: Storage, pages: list[int], span: tuple[int, int], choice: Carried
) -> Offer:
    """Pages that hold positions [span[0], span[1]), packed into the offer itself."""
    start, stop = span
    if isinstance(storage, DeviceStorage):
        stored = storage.to_host(pages)
    else:
        stored = storage.tensor[:, :, pages]
    payload = pack(stored, choice).numpy()
    numbers = tuple(range(len(pages)))
    name = _NAMES[choice]
    return Offer(lease_id, name, "", numbers, (), start, stop, storage.kv_format, payload)


def carries(offered: Offer) -> bool:
    """Whether an offer was made here."""
    return offered.transport in _NAMES.values()


def fetch(offered: Offer, storage: Storage, pages: list[int]) -> int:
    """Unpack an offer into `pages`; returns the bytes that crossed. ValueError when the two
    storages differ in shape or format."""
    check_format(offered, storage)
    choice: Carried = "int8" if offered.transport == _NAMES["int8"] else "int4"
    layers, two, _, page_tokens, heads, _ = sizes(storage.shape, storage.kv_format)
    width = _head_bytes(storage.shape.head_dim, choice)
    wanted = (layers, two, len(offered.pages), page_tokens, heads, width)
    if tuple(offered.payload.shape) != wanted:
        raise ValueError(
            f"packed pages have shape {tuple(offered.payload.shape)}, expected {wanted}; engine "
            "settings must be equal"
        )
    packed = torch.tensor(offered.payload)
    stored = unpack(packed, choice, storage.shape.head_dim).to(stored_dtype(storage.kv_format))
    receive(stored, offered.pages, storage, pages, offered.tokens)
    return int(packed.numel())


def pack(stored: Tensor, choice: Carried) -> Tensor:
    """[..., head_dim] floats to uint8 [..., bytes of a head]."""
    head_dim = stored.shape[-1]
    groups = torch.unflatten(stored.float(), -1, (-1, _group(head_dim, choice)))
    scale = groups.abs().amax(-1, keepdim=True) / _TOP[choice]
    scale = scale.to(torch.float32 if choice == "int8" else torch.float16)
    # A scale that float16 rounds to nothing belongs to values that are nothing beside any other.
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    top = _TOP[choice]
    values = (groups / divisor).round().clamp(-top, top).to(torch.int8).flatten(-2)
    behind = scale.squeeze(-1).contiguous().view(torch.uint8)
    if choice == "int4":
        low, high = (values[..., part::2].view(torch.uint8) & 15 for part in (0, 1))
        return torch.cat((low | high << 4, behind), -1)
    return torch.cat((values.view(torch.uint8), behind), -1)


def unpack(packed: Tensor, choice: Carried, head_dim: int) -> Tensor:
    """The reverse of `pack`, float32 [..., head_dim]."""
    width = head_dim // 2 if choice == "int4" else head_dim
    values, behind = packed[..., :width], packed[..., width:].contiguous()
    if choice == "int4":
        signed = torch.stack((values & 15, values >> 4), -1).flatten(-2).to(torch.int8)
        numbers = torch.where(signed > 7, signed - 16, signed)
    else:
        numbers = values.contiguous().view(torch.int8)
    scale = behind.view(torch.float32 if choice == "int8" else torch.float16).float()
    groups = torch.unflatten(numbers.float(), -1, (-1, _group(head_dim, choice)))
    return (groups * scale[..., None]).flatten(-2)


def _group(head_dim: int, choice: Carried) -> int:
    """Values that share a scale."""
    return GROUP if choice == "int4" and head_dim % GROUP == 0 else head_dim


def _head_bytes(head_dim: int, choice: Carried) -> int:
    if choice == "int8":
        return head_dim + 4
    return head_dim // 2 + 2 * (head_dim // _group(head_dim, choice))
