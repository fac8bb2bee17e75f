"""The kernel of kv_write: the reference's bits, whatever the layout, and nothing else touched."""

import pytest
import torch

from kernels.reference import kv_cache as reference
from kernels.triton.kv_cache import kv_write
from tests.kernels.triton.conformance import conforms, every, normal, watched

KINDS = ("float16", "int8", "int4")
# Where the reference runs: on a GPU torch divides by a number as it multiplies by its inverse.
EXACT = "cpu"


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("kv_cache"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    conforms(case, target, rows, dtype)


def caches(kind: str, *shape: int, width: int, like: torch.Tensor, bits: int = 5):
    """[numbers, scales] of keys, or of values in 4 bits, full of 7."""
    if kind == "float16":
        numbers, scales = torch.float16, None
    elif kind == "int8":
        numbers, scales = torch.int8, like.new_full(shape, 7)
    else:
        numbers, scales = torch.uint8, like.new_full((*shape, width // 32), 7).half()
    size = width * bits // 8 if kind == "int4" else width
    made = torch.full((*shape, size), 7, dtype=numbers, device=like.device)
    return made, scales


def both(kind, keys, values, slots, *shape):
    """What the kernel and the reference make of equal caches: two lists, on the CPU."""
    results = []
    for write, device in ((kv_write, keys.device), (reference.kv_write, EXACT)):
        new = [each.to(device) for each in (keys, values, slots)]
        k, ks = caches(kind, *shape, width=keys.shape[-1], like=new[0].float())
        v, vs = caches(kind, *shape, width=keys.shape[-1], like=new[0].float(), bits=4)
        write(new[0], new[1], new[2], k, v, ks, vs)
        results.append([each.cpu() for each in (k, v, ks, vs) if each is not None])
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_the_references(kind):
    """Rows with zeros, with ties, tiny, large and flat ones; a token that is padding."""
    keys, values = normal(6, 2, 96), normal(6, 2, 96, seed=2) * 1e-3
    keys[0], values[1] = 0, 2.5
    keys[1, 0] = torch.arange(96.0) - 48  # steps that fall on halves
    keys[2] *= 1e-6
    keys[3] *= 600
    values[2] *= 1e-38
    slots = torch.tensor([11, 0, -1, 5, 6, 3], device=keys.device)
    with watched():
        mine, right = both(kind, keys, values, slots, 3, 4, 2)
    for got, wanted in zip(mine, right, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_of_many_and_heads_of_a_larger_row(kind):
    """Keys and values as they come out of one projection, into a slice of a larger cache."""
    fused = normal(5, 8, 32, dtype=torch.bfloat16)
    slots = torch.tensor([9, 2, 7, 0, 4], device=fused.device)
    args = (fused[:, 4:6], fused[:, 6:], slots)
    flat, scales = caches(kind, 2, 3, 4, 3, width=32, like=fused.float())
    layer, layer_scales = flat[1, :, :, :2], None if scales is None else scales[1, :, :, :2]
    right, right_scales = caches(kind, 3, 4, 2, width=32, like=fused.float().to(EXACT))
    others, other_scales = right.clone(), None if scales is None else right_scales.clone()
    plain = [each.to(EXACT) for each in args]
    reference.kv_write(plain[0], plain[1], plain[2], right, others, right_scales, other_scales)
    more = others.zero_().to(fused.device)
    more_scales = None if other_scales is None else other_scales.to(fused.device)
    with watched():
        kv_write(*args, layer, more, layer_scales, more_scales)
    assert torch.equal(layer.cpu(), right)
    if layer_scales is not None and right_scales is not None:
        assert torch.equal(layer_scales.cpu(), right_scales)
    assert (flat[0] == 7).all() and (flat[1, :, :, 2] == 7).all()


def test_a_float_cache_of_another_dtype():
    keys, slots = normal(4, 1, 24, dtype=torch.bfloat16), torch.arange(4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cache = torch.zeros(2, 2, 1, 24, dtype=dtype, device=keys.device)
        with watched():
            kv_write(keys, keys, slots.to(keys.device), cache, cache.clone(), None, None)
        assert torch.equal(cache.view(4, 1, 24), keys.to(dtype))


def test_gaps_are_refused():
    keys, slots = normal(2, 1, 32), torch.arange(2, device=normal(1).device)
    cache = torch.zeros(4, 4, 1, 64, device=keys.device)
    with pytest.raises(ValueError, match="key_cache should lie side by side"):
        kv_write(keys, keys, slots, cache[..., ::2], cache[..., :32], None, None)
    with pytest.raises(ValueError, match="value_cache should follow one another"):
        kv_write(keys, keys, slots, cache[..., :32], cache[:, :2, :, :32], None, None)
