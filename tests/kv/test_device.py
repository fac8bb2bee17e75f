"""KV storage on a device: layout, sizes, copies of pages, refusals."""

import pytest
import torch

from serve.kv.device import DeviceStorage
from serve.kv.pool import PagePool
from serve.kv.storage import KVShape, token_bytes
from tests.models.device_models import DEVICE

SHAPE = KVShape(layers=3, pages=5, page_tokens=4, kv_heads=2, head_dim=32)
FORMATS = ["float32", "float16", "bfloat16", "int8", "int4"]


@pytest.mark.parametrize("kv_format", FORMATS)
def test_takes_the_bytes_that_the_same_format_takes_on_a_cpu(kv_format: str):
    storage = DeviceStorage(SHAPE, kv_format, DEVICE)
    planes = [plane for plane in storage.cache if plane is not None]
    held = sum(plane.numel() * plane.element_size() for plane in planes)
    assert storage.token_bytes == token_bytes(SHAPE, kv_format)
    assert held == storage.token_bytes * SHAPE.pages * SHAPE.page_tokens
    assert all(plane.device.type == DEVICE.type and not plane.any() for plane in planes)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_shared_page_is_copied_whole(kv_format: str):
    storage = DeviceStorage(SHAPE, kv_format, DEVICE)
    pool = PagePool(SHAPE.pages, SHAPE.page_tokens, storage)
    [page] = pool.allocate(1) or []
    for plane in storage.cache:
        if plane is not None:
            plane[:, :, page] = torch.randint(1, 9, plane[:, :, page].shape).to(plane)
    before = [None if plane is None else plane.clone() for plane in storage.cache]
    pool.retain([page])
    fresh = pool.writable(page)
    assert fresh is not None and fresh != page
    for plane, was in zip(storage.cache, before, strict=True):
        if plane is not None and was is not None:
            assert torch.equal(plane[:, :, fresh], was[:, :, page])
            others = [each for each in range(SHAPE.pages) if each != fresh]
            assert torch.equal(plane[:, :, others], was[:, :, others])


def test_refusals():
    with pytest.raises(ValueError, match="int3 is not supported; use one of float32"):
        DeviceStorage(SHAPE, "int3", DEVICE)
    with pytest.raises(ValueError, match="heads of a multiple of 32 values, not of 24"):
        DeviceStorage(SHAPE._replace(head_dim=24), "int4", DEVICE)
    with pytest.raises(ValueError, match="at least 1"):
        DeviceStorage(SHAPE._replace(pages=0), "int8", DEVICE)
    with pytest.raises(ValueError, match=r"memory, which are not to be had: lower engine.kv_tok"):
        DeviceStorage(SHAPE._replace(page_tokens=1 << 50), "int8", DEVICE)


def test_closed_is_closed():
    storage = DeviceStorage(SHAPE, "int8", DEVICE)
    storage.close()
    storage.close()
    with pytest.raises(AssertionError, match="closed"):
        _ = storage.cache
