"""Packed pages: how far off values come back, against arithmetic of the test's own."""

import numpy as np
import pytest
import torch

from serve.kv.storage import KVShape, KVStorage
from serve.migrate import codec

SHAPE = KVShape(layers=2, pages=6, page_tokens=4, kv_heads=3, head_dim=64)


def stored(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 2, 3, 4, 3, 64, generator=generator)
    return (values * torch.logspace(-3, 3, 3)[:, None]).to(dtype)


def nearest(values, top, group, scale_type):
    """By NumPy, value by value: the nearest multiple of each group's scale."""
    groups = values.float().numpy().astype(np.float64).reshape(*values.shape[:-1], -1, group)
    scale = np.abs(groups).max(-1, keepdims=True).astype(np.float32) / np.float32(top)
    scale = scale.astype(scale_type).astype(np.float64)
    scale[scale == 0] = 1
    return (np.clip(np.rint(groups / scale), -top, top) * scale).reshape(values.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("choice", ["int8", "int4"])
def test_values_come_back_as_the_nearest_multiples_of_their_scale(choice, dtype):
    values = stored(dtype=dtype)
    back = codec.unpack(codec.pack(values, choice), choice, 64).numpy()
    top, group, scale_type = (127, 64, np.float32) if choice == "int8" else (7, 32, np.float16)
    expected = nearest(values, top, group, scale_type)
    # A value in the middle of two multiples may fall to either by the last bit of a division.
    off = np.abs(back - expected)
    largest = np.abs(expected).max(-1, keepdims=True) / top
    assert (off <= 1e-5 * largest + 1e-12).mean() > 0.999
    assert (off <= 1.001 * largest + 1e-12).all()


def test_nothing_and_less_than_a_scale_can_say_come_back_near_nothing():
    values = torch.zeros(1, 2, 1, 1, 1, 64)
    values[..., 0] = 1e-9
    for choice in ("int8", "int4"):
        back = codec.unpack(codec.pack(values, choice), choice, 64)
        assert back.isfinite().all() and back.abs().max() <= 1e-8


@pytest.mark.parametrize("choice", ["int8", "int4"])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_an_offer_fills_its_tokens_and_nothing_else(choice, head_dim):
    shape = SHAPE._replace(head_dim=head_dim)
    sender, receiver = KVStorage(shape, "float16"), KVStorage(shape, "float16")
    sender.tensor.normal_(generator=torch.Generator().manual_seed(1))
    receiver.tensor.fill_(7)
    offered = codec.offer("lease", sender, [4, 1, 2], (8, 18), choice)
    assert codec.carries(offered) and offered.tokens == 10
    moved = codec.fetch(offered, receiver, [0, 3, 5])
    assert moved == 3 * 4 * codec.token_bytes(shape, choice) == offered.payload.nbytes
    raw = 3 * 4 * sender.token_bytes
    assert moved < raw * (0.6 if head_dim == 64 else 0.8)
    sent, got = sender.tensor[:, :, [4, 1, 2]].float(), receiver.tensor[:, :, [0, 3, 5]].float()
    step = sent.abs().amax() / (127 if choice == "int8" else 7)
    assert (sent - got)[:, :, :2].abs().max() <= step * 0.51
    assert (sent - got)[:, :, 2, :2].abs().max() <= step * 0.51
    assert (got[:, :, 2, 2:] == 7).all(), "slots behind the last token were written"
    assert (receiver.tensor[:, :, [1, 2, 4]] == 7).all()


def test_other_sizes_and_formats_are_refused_by_name():
    sender = KVStorage(SHAPE, "float16")
    offered = codec.offer("lease", sender, [0], (0, 4), "int8")
    with pytest.raises(ValueError, match="float16, ours in float32"):
        codec.fetch(offered, KVStorage(SHAPE, "float32"), [0])
    with pytest.raises(ValueError, match="packed pages have shape"):
        codec.fetch(offered, KVStorage(SHAPE._replace(kv_heads=2), "float16"), [0])


def test_only_floats_are_packed():
    assert codec.choices("float16") == codec.choices("float32") == ("int8", "int4")
    assert codec.choices("int8") == codec.choices("int4") == ()
