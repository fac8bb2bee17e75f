"""Layer D, the roofline: bounds that can be checked by hand, and what moves them."""

import math

import pytest

from kernels.triton.case import Case, Work
from kernels.triton.targets import Card, target
from kernels.triton.verify import roofline

# 100 multiprocessors, 1 TB/s, 10 and 100 and 200 tera-operations/s.
CARD = Card("made up", 100, 1e12, 10e12, 100e12, 200e12, 0, "nobody")
A100 = target("sm_80")
USED = {"registers": 32, "shared_bytes": 0}


def case(
    moved_bytes: int, operations: int, programs: int, matrix: str = "", warps: int = 8
) -> Case:
    work = Work(moved_bytes, operations, (programs,))
    return Case("op/case", None, {}, {}, (), warps, 1, matrix, work)


def bound(given: Case, **used: int) -> roofline.Bound:
    return roofline.bound(A100, CARD, given, {**USED, **used})


def test_many_bytes_take_what_the_bandwidth_allows():
    made = bound(case(10**9, 10**6, 10**5))
    assert made.limiter == "memory" and made.seconds == pytest.approx(1e-3)


@pytest.mark.parametrize("matrix, seconds", [("", 0.1), ("half", 0.01), ("int8", 0.005)])
def test_many_operations_take_what_their_unit_allows(matrix, seconds):
    made = bound(case(10**6, 10**12, 10**4, matrix))
    assert made.limiter == ("matrix units" if matrix else "arithmetic")
    assert made.seconds == pytest.approx(seconds)


def test_a_grid_that_does_not_fill_the_card_wastes_it():
    full, half, one_more = (bound(case(1, 10**12, n)).seconds for n in (100, 50, 101))
    assert half == pytest.approx(2 * full)
    # One program more than there are multiprocessors, and all wait for the second round.
    assert one_more == pytest.approx(full * 200 / 101)
    assert bound(case(1, 10**12, 50)).limiter == "few or uneven programs"


def test_few_programs_cannot_ask_for_all_bytes_at_once():
    """Little's law: ten programs of 256 threads have room for 32 numbers of 4 bytes each, and wait
    0.7 us for them."""
    made = bound(case(10**6, 1, 10))
    assert made.limiter == "delay of memory"
    assert made.seconds == pytest.approx(10**6 / (10 * 256 * 32 * 4) * 0.7e-6)


def test_nothing_is_quicker_than_memory_answers():
    """However few bytes there are, once for each round of programs that the card holds."""
    assert bound(case(64, 1, 1)).seconds == pytest.approx(0.7e-6)
    # 8 warps of 32 registers: 8 programs of 256 threads on each of the 100 multiprocessors.
    assert bound(case(64 * 1600, 1, 1600)).seconds == pytest.approx(2 * 0.7e-6)


@pytest.mark.parametrize(
    "registers, shared_bytes, warps, programs",
    [
        (32, 0, 4, 16),  # 128 threads: 65536 / (32 * 128), and 2048 / 128
        (64, 0, 4, 8),
        (255, 0, 4, 2),
        (33, 0, 4, 12),  # registers come in eights
        (32, 40 * 1024, 4, 4),  # 164 KiB / 41 KiB
        (32, 163 * 1024, 4, 1),
        (32, 164 * 1024, 4, 0),
        (32, 0, 32, 2),
        (16, 0, 1, 32),
    ],
)
def test_how_many_programs_are_resident(registers, shared_bytes, warps, programs):
    assert roofline.resident(A100, case(1, 1, 1, warps=warps), registers, shared_bytes) == programs


def test_every_case_that_ships_has_a_bound(capsys, monkeypatch):
    """No less than its bytes and its operations take, on every card of three targets."""
    seen = 0
    for each in roofline.lines(["A100", "T4", "MI300X"], set()):
        work, card = each.case.work, each.card
        assert math.isfinite(each.bound.seconds) and each.bound.programs_per_unit > 0, (
            each.case.name
        )
        assert each.bound.seconds >= work.moved_bytes / card.bandwidth_bytes_s
        assert each.bound.seconds >= work.operations / roofline.peak(card, each.case.matrix)
        seen += 1
    assert seen > 150
    monkeypatch.setattr("sys.argv", ["roofline", "--cards", "A100", "--ops", "rms_norm"])
    assert roofline.main() == 0
    printed = capsys.readouterr().out
    assert "not speeds" in printed and "rms_norm/float16-4096" in printed and "T4" not in printed
