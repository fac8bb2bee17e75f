"""Products whose sum over K is cut into parts: the oracle's results, whatever their number."""

from typing import Any

import pytest
import torch

from kernels.reference.linear_w4 import dequantize_w4
from kernels.reference.linear_w8 import dequantize_w8
from kernels.triton import linear_w4, linear_w8, split
from kernels.triton.configs import Config, choose, tried
from kernels.triton.plan import Plan, run
from kernels.triton.targets import target
from tests.kernels.ops.cases import Source, eight, four
from tests.kernels.ops.measure import agree, error
from tests.kernels.triton.conformance import DEVICE, watched

TILES = Config(0, {"BM": 16, "BN": 16, "BK": 64}, 4, 2)


def few(rows: int, columns: int, terms: int) -> list[torch.Tensor]:
    """x, and a bias: float16, on the device."""
    source = Source(rows, torch.float16)
    return [source.normal(rows, terms).to(DEVICE), source.normal(columns).to(DEVICE)]


def w4(programs: int, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the launcher gives, and the product in float64."""
    weight: Any = four(Source(4, torch.float16), bias.shape[0], x.shape[1], 32, False)
    plain = dequantize_w4(weight[0], weight[1], weight[2], torch.float64)
    exact = x.cpu().double() @ plain.T + bias.cpu().double()
    moved: Any = [each.to(DEVICE) for each in weight]
    with watched("sm_90"), tried("w4_linear", TILES._replace(programs=programs)):
        return linear_w4.w4_linear(x, moved[0], moved[1], moved[2], bias), exact


def w8(programs: int, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, scales = eight(Source(4, torch.float16), bias.shape[0], x.shape[1], x.shape[1])
    exact = x.cpu().double() @ dequantize_w8(q, scales, torch.float64).T + bias.cpu().double()
    with watched("sm_90"), tried("w8_linear", TILES._replace(programs=programs)):
        return linear_w8.w8_linear(x, q.to(DEVICE), scales.to(DEVICE), bias), exact


@pytest.mark.parametrize("product", [w4, w8])
@pytest.mark.parametrize(("rows", "terms"), [(3, 448), (17, 416)])
def test_parts_do_not_change_the_result(product: Any, rows: int, terms: int):
    """Seven tiles along K, the last one of them whole or not: alone, or in two parts."""
    given = few(rows, 21, terms)
    for programs in (0, 8 if rows > 16 else 4):
        agree(*product(programs, *given))


def test_what_is_launched(monkeypatch: pytest.MonkeyPatch):
    """Two parts and their sum, and a bias that is added once: it would be seen."""
    launched: list[tuple[int, ...]] = []

    def noted(plan: Plan) -> None:
        launched.append(plan.grid)
        run(plan)

    monkeypatch.setattr(linear_w4, "run", noted)
    w4(4, *few(3, 21, 448))
    assert launched == [(1, 2, 2), (1,)]


def test_a_part_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch):
    plan = split.sum_plan
    monkeypatch.setattr(
        linear_w4, "sum_plan", lambda target, sums, *rest: plan(target, sums[:-1], *rest)
    )
    assert error(*w4(4, *few(3, 21, 448))).rms > 0.1


def test_how_many_parts():
    """As many programs as asked for, about; no part of fewer than three tiles."""
    asked = TILES._replace(programs=264)
    assert [split.parts_for(asked, tiles, 32) for tiles in (1, 64, 128, 200, 1000)] == [
        10, 4, 2, 1, 1,
    ]  # fmt: skip
    assert split.parts_for(asked, 1, 5) == 1 and split.parts_for(TILES, 1, 32) == 1


def test_what_is_tried_is_for_its_op_and_its_time_alone():
    before = choose("w4_linear", target("sm_90"), 16)
    with tried("w4_linear", TILES):
        assert choose("w4_linear", target("sm_75"), 10**6) is TILES
        assert choose("w8_linear", target("sm_90"), 16) is not TILES
    assert choose("w4_linear", target("sm_90"), 16) == before
