"""Any machine: the bytes travel with the reply, as one array that Ray places in its object store.

The receiver called the sender, so it owns the reply and the array outlives the sender (an object
`put` by the sender would die with it). One more copy than shared memory on each side.
"""

import warnings
from typing import Any

import numpy as np
import torch

from serve.kv.device import DeviceStorage, Storage
from serve.kv.storage import sizes, stored_dtype
from serve.transport.contract import Offer, check_format
from serve.transport.copy import copy_pages, receive


class RayObjectTransport:
    """Sends by value; knows nothing of Ray itself, only that the payload is one numpy array."""

    name = "ray_object"

    def offer(
        self, lease_id: str, storage: Storage, pages: list[int], start_tokens: int, stop: int
    ) -> Offer:
        gathered = _gathered(storage, pages, stop - start_tokens)
        payload = gathered.view(torch.uint8).numpy()  # bfloat16 has no numpy type
        return Offer(
            lease_id,
            self.name,
            "",
            tuple(range(len(pages))),
            (),
            start_tokens,
            stop,
            storage.kv_format,
            payload,
        )

    def fetch(self, offer: Offer, storage: Storage, pages: list[int]) -> int:
        if not isinstance(offer.payload, np.ndarray):
            raise ValueError(f"lease {offer.lease_id} carries no payload for {self.name}")
        check_format(offer, storage)
        if not offer.tokens:
            return 0
        layers, two, _, *page = sizes(storage.shape, storage.kv_format)
        sent = _as_tensor(offer.payload).view(stored_dtype(storage.kv_format))
        if sent.shape != (layers, two, len(offer.pages), *page):
            raise ValueError(
                f"payload has shape {tuple(sent.shape)}, expected "
                f"{(layers, two, len(offer.pages), *page)}; engine settings must be equal"
            )
        return receive(sent, offer.pages, storage, pages, offer.tokens)

    def close(self) -> None:
        """Nothing is kept."""


def _gathered(storage: Storage, pages: list[int], tokens: int) -> torch.Tensor:
    """[layers, 2, pages, ...] in host memory, of which `tokens` slots count."""
    if isinstance(storage, DeviceStorage):
        return storage.to_host(pages)
    layers, two, _, *page = storage.tensor.shape
    gathered = torch.empty((layers, two, len(pages), *page), dtype=storage.tensor.dtype)
    copy_pages(storage.tensor, tuple(pages), gathered, list(range(len(pages))), tokens)
    return gathered


def _as_tensor(payload: "np.ndarray[Any, np.dtype[np.uint8]]") -> torch.Tensor:
    """The same memory as a tensor. Ray's arrays are read-only and so is our use of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(payload)
