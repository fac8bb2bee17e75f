"""Layer D, the roofline: the least time that a case could take on a card, and what sets it.

    python -m kernels.triton.verify.roofline [--cards H100] [--ops w4_linear]

A bound, from data sheets and from what the compiled case says of itself; nothing is measured, and
a kernel is slower than its bound. Three limits are compared: the bytes to be moved over the card's
bandwidth; the operations over the peak of the unit that does them, as far as the grid keeps all
multiprocessors busy; and the delay of memory over the bytes that can be under way at once (Little's
law). Instructions that are neither are not counted: unpacking weights of 4 bits costs some. Reads
kernels/triton/aot.json for registers and shared memory.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from kernels.triton.case import Case
from kernels.triton.targets import KIB, TARGETS, Card, Target
from kernels.triton.verify.aot import items, read

DELAY_S = 0.7e-6  # of memory under load; an assumption, the same for all cards


class Unit(NamedTuple):
    """What a multiprocessor (AMD: a compute unit) has for the programs on it. shared_bytes: all
    of it, a little of which each program costs beside its own."""

    registers: int
    shared_bytes: int
    threads: int
    programs: int


# CUDA C++ programming guide, technical specifications by compute capability; AMD CDNA and RDNA3
# instruction set documents. A register is of 32 bits.
_UNITS = {
    "sm_75": Unit(65536, 64 * KIB, 1024, 16),
    "sm_80": Unit(65536, 164 * KIB, 2048, 32),
    "sm_86": Unit(65536, 100 * KIB, 1536, 16),
    "sm_89": Unit(65536, 100 * KIB, 1536, 24),
    "sm_90": Unit(65536, 228 * KIB, 2048, 32),
    "sm_100": Unit(65536, 228 * KIB, 2048, 32),
    "sm_120": Unit(65536, 100 * KIB, 1536, 24),
    "gfx90a": Unit(131072, 64 * KIB, 2048, 32),
    "gfx942": Unit(131072, 64 * KIB, 2048, 32),
    "gfx1100": Unit(98304, 64 * KIB, 1024, 32),
}
RESERVED_BYTES = KIB  # of shared memory, for each program


class Bound(NamedTuple):
    """seconds: the least time. limiter: what sets it. programs_per_unit: how many are resident."""

    seconds: float
    limiter: str
    programs_per_unit: int


def resident(target: Target, case: Case, registers: int, shared_bytes: int) -> int:
    """How many programs of the case one multiprocessor holds at once, by what each needs."""
    unit, threads = _UNITS[target.name], case.num_warps * target.warp_threads
    per_thread = math.ceil(max(registers, 1) / 8) * 8
    limits = [unit.registers // (per_thread * threads), unit.threads // threads, unit.programs]
    if shared_bytes:
        limits.append(unit.shared_bytes // (shared_bytes + RESERVED_BYTES))
        # A program may have all of the shared memory but what is reserved for it.
        limits[-1] = max(limits[-1], int(shared_bytes <= target.shared_limit_bytes))
    return min(limits)


def peak(card: Card, matrix: str) -> float:
    """Operations a second of the unit that a case uses."""
    units = {"": card.float32, "half": card.half, "int8": card.int8, "fp8": card.fp8}
    return units[matrix]


def bound(target: Target, card: Card, case: Case, compiled: dict[str, Any]) -> Bound:
    """compiled: the case's entry of aot.json, without faults. An op that moves nothing has no
    bound: AssertionError."""
    work, programs = case.work, math.prod(case.work.grid)
    assert work.moved_bytes > 0 and programs > 0
    at_once = resident(target, case, compiled["registers"], compiled["shared_bytes"])
    memory_s = work.moved_bytes / card.bandwidth_bytes_s
    # The multiprocessor that has the most programs is the last to finish.
    uneven = math.ceil(programs / card.multiprocessors) * card.multiprocessors / programs
    arithmetic_s = work.operations / peak(card, case.matrix) * uneven
    unit = "matrix units" if case.matrix else "arithmetic"
    together = min(programs, card.multiprocessors * max(at_once, 1))
    under_way = together * _in_flight(case, compiled, target)
    limits = {
        "memory": memory_s,
        "few or uneven programs" if uneven > 1.1 else unit: arithmetic_s,
        "delay of memory": work.moved_bytes * DELAY_S / under_way,
    }
    limiter = max(limits, key=lambda name: limits[name])
    return Bound(limits[limiter], limiter, at_once)


def _in_flight(case: Case, compiled: dict[str, Any], target: Target) -> float:
    """The most bytes that a program can have asked for and not yet used: all that it moves, or
    what its registers and its shared memory hold."""
    threads = case.num_warps * target.warp_threads
    room = 4 * compiled["registers"] * threads + compiled["shared_bytes"]
    return min(float(room), case.work.moved_bytes / math.prod(case.work.grid))


class Line(NamedTuple):
    card: Card
    target: Target
    case: Case
    bound: Bound


def lines(cards: list[str], ops: set[str]) -> Iterator[Line]:
    """Of every case that ships, on every card whose name contains one of `cards`; all of either
    where nothing is asked for."""
    results = read()
    for target in TARGETS:
        chosen = [c for c in target.cards if not cards or any(name in c.name for name in cards)]
        for item in items((target,)) if chosen else ():
            entry = results.get(target.name, {}).get(item.name, {})
            case = item.case
            if case is None or entry.get("faults") != [] or (ops and case.op not in ops):
                continue
            for card in chosen:
                yield Line(card, target, case, bound(target, card, case, entry))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", default="", help="comma-separated parts of names")
    parser.add_argument("--ops", default="", help="comma-separated")
    asked = parser.parse_args()
    cards = [name for name in asked.cards.split(",") if name]
    print("Bounds by data sheets, not speeds: a kernel takes longer than this.")
    print(f"{'card':16} {'case':42} {'bound':>12}  {'limited by':22} programs per unit")
    for each in lines(cards, {op for op in asked.ops.split(",") if op}):
        microseconds = f"{each.bound.seconds * 1e6:.2f} us"
        print(
            f"{each.card.name:16} {each.case.name:42} {microseconds:>12}  "
            f"{each.bound.limiter:22} {each.bound.programs_per_unit}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
