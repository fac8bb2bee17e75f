"""Copying KV between two paged storages, run by run. Used by the transports."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from serve.kv.device import DeviceStorage, Storage


class Run(NamedTuple):
    """`pages` consecutive pages on both sides, from `source` to `target`."""

    source: int
    target: int
    pages: int


def runs(source: tuple[int, ...] | list[int], target: list[int]) -> Iterator[Run]:
    """Cut two equally long page lists into maximal runs consecutive on both sides."""
    assert len(source) == len(target), (len(source), len(target))
    start = 0
    for i in range(1, len(source) + 1):
        ends = i == len(source) or source[i] != source[i - 1] + 1 or target[i] != target[i - 1] + 1
        if ends and i > start:
            yield Run(source[start], target[start], i - start)
            start = i


def copy_pages(
    source_kv: Tensor, source: tuple[int, ...], target_kv: Tensor, target: list[int], tokens: int
) -> int:
    """Copy the first `tokens` slots of pages `source` to pages `target`; returns bytes copied.

    Both tensors are [layers, 2, pages, page_tokens, kv_heads, elements]; a page list longer than
    needed is an error. A partly filled last page moves only its filled slots.
    """
    page_tokens = source_kv.shape[3]
    full, rest = divmod(tokens, page_tokens)
    assert len(source) == len(target) == full + bool(rest), (len(source), len(target), tokens)
    copied = 0
    for run in runs(source[:full], target[:full]):
        piece = source_kv[:, :, run.source : run.source + run.pages]
        target_kv[:, :, run.target : run.target + run.pages].copy_(piece)
        copied += piece.numel() * piece.element_size()
    if rest:
        piece = source_kv[:, :, source[full], :rest]
        target_kv[:, :, target[full], :rest].copy_(piece)
        copied += piece.numel() * piece.element_size()
    return copied


def receive(
    source_kv: Tensor, source: tuple[int, ...], storage: Storage, target: list[int], tokens: int
) -> int:
    """As copy_pages, into a replica's storage, wherever that is. A GPU takes whole pages: what a
    partly filled one holds behind its tokens is written before it is read."""
    if not isinstance(storage, DeviceStorage):
        return copy_pages(source_kv, source, storage.tensor, target, tokens)
    assert len(source) == len(target), (len(source), len(target))
    storage.from_host(source_kv[:, :, list(source)], target)
    return tokens * storage.token_bytes
