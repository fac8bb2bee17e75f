"""How far a result may be from its oracle: integers not at all, floats by dtype.

Two numbers, so that neither a few wild values nor a small error everywhere goes unseen: the rms of
the error against the rms of the oracle, and the largest error against its value, or the oracle's
rms where that is larger.
"""

from typing import NamedTuple

import torch


class Limit(NamedTuple):
    """What is allowed, of `error`'s two numbers."""

    rms: float
    largest: float


LIMITS = {
    torch.float64: Limit(1e-12, 1e-11),
    torch.float32: Limit(1e-5, 1e-4),
    torch.float16: Limit(2e-3, 2e-2),
    torch.bfloat16: Limit(4e-3, 2e-2),
    torch.float8_e4m3fn: Limit(5e-2, 5e-1),
}
# Within one product of Hopper's units for fp8, terms are aligned to the largest and keep 14 bits:
# each loses up to 2 ** -13 of it. An H100 was 6.5e-5 and 9.7e-5 off, whatever is summed outside.
FP8_ON_A_GPU = Limit(2e-4, 5e-4)


def error(got: torch.Tensor, wanted: torch.Tensor) -> Limit:
    """The two numbers; infinite when one is infinite or NaN where the other is not."""
    got, wanted = got.double().cpu(), wanted.double().cpu()
    infinite = ~torch.isfinite(wanted)
    if not torch.equal(got[infinite], wanted[infinite]) or not torch.isfinite(got[~infinite]).all():
        return Limit(torch.inf, torch.inf)
    got, wanted = got[~infinite], wanted[~infinite]
    if got.numel() == 0:
        return Limit(0, 0)
    off, size = (got - wanted).abs(), wanted.square().mean().sqrt()
    if size == 0:
        return Limit(float(off.max()), float(off.max()))
    relative = off / torch.maximum(wanted.abs(), size)
    return Limit(float(off.square().mean().sqrt() / size), float(relative.max()))


def agree(
    got: torch.Tensor,
    wanted: torch.Tensor,
    dtype: torch.dtype | None = None,
    limit: Limit | None = None,
) -> None:
    """AssertionError unless got is what was wanted, as far as its own dtype, or that given, can be;
    or as far as `limit` says.

    An oracle of integers is met exactly.
    """
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if not got.dtype.is_floating_point:
        assert torch.equal(got.cpu(), wanted.to(got.dtype).cpu()), "integers differ"
        return
    found, limit = error(got, wanted), limit or LIMITS[dtype or got.dtype]
    assert found.rms <= limit.rms and found.largest <= limit.largest, (found, limit)
