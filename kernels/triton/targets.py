"""The kinds of GPU that kernels are compiled for, with their limits and the cards that have them.

Figures of cards are dense peaks from the sheets named in `source`; they bound a kernel's time and
are no measurement. Read by kernels, launchers, the ahead-of-time sweep and the roofline. Imports
no Triton.
"""

from collections.abc import Mapping
from typing import NamedTuple

KIB = 1024
HALF_MMA = r"mma\.sync\.aligned\S*\.(f16|bf16)\.(f16|bf16)\."
INT8_MMA = r"mma\.sync\.aligned\S*\.s8\.s8\."
FP8_MMA = r"mma\.sync\.aligned\S*\.e4m3\.e4m3\."


class Card(NamedTuple):
    """One product: bandwidth in bytes/s, peaks in operations/s of fp32 vectors and of matrix units
    by operand (a sum in 32 bits); 0 where it has no such unit."""

    name: str
    multiprocessors: int
    bandwidth_bytes_s: float
    float32: float
    half: float
    int8: float
    fp8: float
    source: str


class Target(NamedTuple):
    """An architecture that a kernel is compiled for.

    shared_limit_bytes: of one program, opted in. fp8: conversions and products of e4m3fn in
    hardware. dot: `tl.dot` reaches matrix units. matrix: by operand, the regular expression of the
    instructions, one of which a product compiles to.
    """

    name: str
    backend: str
    arch: int | str
    warp_threads: int
    shared_limit_bytes: int
    fp8: bool
    dot: bool
    matrix: Mapping[str, str]
    cards: tuple[Card, ...]


def _card(
    name: str, units: int, gb_s: float, peaks: tuple[float, float, float, float], source: str
) -> Card:
    """peaks in tera-operations/s: fp32 vectors, matrix half, int8, fp8."""
    float32, half, int8, fp8 = (peak * 1e12 for peak in peaks)
    return Card(name, units, gb_s * 1e9, float32, half, int8, fp8, source)


_T4 = _card("T4", 40, 320, (8.1, 65, 130, 0), "NVIDIA T4 datasheet")
_A100 = _card("A100 80GB SXM", 108, 2039, (19.5, 312, 624, 0), "NVIDIA A100 datasheet")
_A10 = _card("A10", 72, 600, (31.2, 125, 250, 0), "NVIDIA A10 datasheet")
_3090 = _card("RTX 3090", 82, 936, (35.6, 71, 284, 0), "NVIDIA GA102 whitepaper")
_L4 = _card("L4", 58, 300, (30.3, 121, 242, 242), "NVIDIA L4 datasheet, halved for dense")
_4090 = _card("RTX 4090", 128, 1008, (82.6, 165, 661, 330), "NVIDIA Ada whitepaper")
_H100 = _card("H100 SXM", 132, 3350, (67, 989, 1979, 1979), "NVIDIA H100 datasheet")
_B200 = _card("B200", 148, 8000, (75, 2250, 4500, 4500), "NVIDIA Blackwell datasheet")
_5090 = _card("RTX 5090", 170, 1792, (104.8, 209, 838, 419), "NVIDIA RTX Blackwell whitepaper")
_MI250 = _card("MI250, one die", 104, 1638, (22.6, 181, 181, 0), "AMD MI250 data sheet, halved")
_MI300 = _card("MI300X", 304, 5300, (163.4, 1307, 2615, 2615), "AMD MI300X data sheet")
_7900 = _card("RX 7900 XTX", 96, 960, (61.4, 122.8, 122.8, 0), "AMD RX 7900 XTX product page")

_SM80 = {"half": HALF_MMA, "int8": INT8_MMA}
_SM89 = {**_SM80, "fp8": FP8_MMA}
_SM90 = {
    "half": rf"wgmma\.mma_async\S*\.(f16|bf16)\.(f16|bf16)\b|{HALF_MMA}",
    "int8": rf"wgmma\.mma_async\S*\.s8\.s8\b|{INT8_MMA}",
    "fp8": rf"wgmma\.mma_async\S*\.e4m3\.e4m3\b|{FP8_MMA}",
}
_SM100 = {
    "half": rf"tcgen05\.mma\S*kind::f16|{HALF_MMA}",
    "int8": rf"tcgen05\.mma\S*kind::i8|{INT8_MMA}",
    "fp8": rf"tcgen05\.mma\S*kind::f8f6f4|{FP8_MMA}",
}
_MFMA = {"half": r"v_mfma_f32_\w*(f16|bf16)", "int8": r"v_mfma_i32_\w*i8"}
_WMMA = {"half": r"v_wmma_f32_\w*(f16|bf16)", "int8": r"v_wmma_i32_\w*iu8"}

TARGETS: tuple[Target, ...] = (
    # Triton has no matrix path on Turing: tl.dot becomes scalar products that spill, so that
    # kernels which need it are refused or sum products themselves.
    Target("sm_75", "cuda", 75, 32, 64 * KIB, False, False, {}, (_T4,)),
    Target("sm_80", "cuda", 80, 32, 163 * KIB, False, True, _SM80, (_A100,)),
    Target("sm_86", "cuda", 86, 32, 99 * KIB, False, True, _SM80, (_A10, _3090)),
    Target("sm_89", "cuda", 89, 32, 99 * KIB, True, True, _SM89, (_L4, _4090)),
    Target("sm_90", "cuda", 90, 32, 227 * KIB, True, True, _SM90, (_H100,)),
    Target("sm_100", "cuda", 100, 32, 227 * KIB, True, True, _SM100, (_B200,)),
    Target("sm_120", "cuda", 120, 32, 99 * KIB, True, True, _SM89, (_5090,)),
    Target("gfx90a", "hip", "gfx90a", 64, 64 * KIB, False, True, _MFMA, (_MI250,)),
    # Its float8 is e4m3fnuz: another bias, no negative zero. e4m3fn would be converted, unasked.
    Target("gfx942", "hip", "gfx942", 64, 64 * KIB, False, True, _MFMA, (_MI300,)),
    Target("gfx1100", "hip", "gfx1100", 32, 64 * KIB, False, True, _WMMA, (_7900,)),
)


def target(name: str) -> Target:
    """The target of this name. ValueError for one that is not in the catalogue."""
    for known in TARGETS:
        if known.name == name:
            return known
    names = ", ".join(each.name for each in TARGETS)
    raise ValueError(f"GPU target {name!r} is not in the catalogue; accepted are {names}.")


def cuda_target(major: int, minor: int) -> Target:
    """The target for a CUDA device of this compute capability.

    Code for X.y runs on X.z with z >= y, and such a device has at least the shared memory of the
    older one; so the newest target of the same X that is not newer is taken. ValueError if none.
    """
    fitting = [
        each
        for each in TARGETS
        if each.backend == "cuda"
        and isinstance(each.arch, int)
        and each.arch // 10 == major
        and each.arch % 10 <= minor
    ]
    if not fitting:
        names = ", ".join(each.name for each in TARGETS if each.backend == "cuda")
        raise ValueError(f"compute capability {major}.{minor} fits none of {names}.")
    return fitting[-1]
