"""The rows of the GPU benchmark compute what they claim to, whoever times them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.triton.bench import attention, linear, measure, page, rows
from kernels.triton.bench.__main__ import GROUPS
from kernels.triton.linear_w4 import w4_linear as right
from tests.kernels.triton.conformance import DEVICE, watched

# Small enough for the interpreter; what a row is made of does not change.
SMALL: dict[Any, dict[str, Any]] = {
    linear: {"SHAPES": ((32, 64),), "ROWS": (1, 17)},
    attention: {
        "PROMPTS": (24,), "STREAMS": (2,), "CONTEXTS": (48,), "HEADS": 4, "KV_HEADS": 2,
        "WIDTH": 32,
    },
    rows: {
        "HIDDEN": 64, "INNER": 48, "HEADS": 4, "KV_HEADS": 2, "WIDTH": 32, "TOKENS": (1, 3),
        "EXPERTS": 2, "ROUTED": (6,), "ADAPTERS": 2, "BATCHES": (4,), "RANK": 16,
    },
    measure: {"ROTATED_BYTES": 1},
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, values in SMALL.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(attention, "splits_for", lambda *_: 2)
    with watched("sm_90"):
        yield


def made(group: str) -> Iterator[tuple[measure.Row, list[measure.Contender]]]:
    for row in GROUPS[group](torch.device(DEVICE)):
        yield row, row.make()


@pytest.mark.parametrize("group", GROUPS)
def test_ours_agree_with_their_oracle(group: str, small: None):
    for row, contenders in made(group):
        ours = [each for each in contenders if each.ours]
        assert ours and len(ours) < len(contenders), row.case
        for each in ours:
            assert each.check is not None
            assert each.check() < 0.02, f"{row.case}: {each.name}"
            each.call(0)


def test_a_wrong_kernel_is_seen(small: None, monkeypatch: pytest.MonkeyPatch):
    """A product that forgets the scales has an error that the table shows."""
    monkeypatch.setattr(linear, "w4_linear", lambda x, q, s, m: right(x, q, torch.ones_like(s), m))
    contenders = next(made("linear"))[1]
    check = contenders[0].check
    assert check is not None and check() > 0.5


def test_a_failing_contender_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    def broken(_: int) -> object:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "_events_s", lambda run: (run(), 2.0)[1])
    monkeypatch.setattr(measure, "_graph", lambda calls: None)
    good = measure.Contender("good", lambda _: None, True)
    bad = measure.Contender("bad", broken, False)
    first, second = measure.measure([bad, good], 3)
    assert first.failure == "RuntimeError: no such kernel" and first.seconds is None
    assert second.seconds == 2.0 and not second.captured and not second.failure


def ours(name: str, us: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "us": us, "captured": True, "error": None, **more}


def test_a_page_has_ratios_to_the_fastest_peer():
    peers = [ours("slow", 30.0), ours("fast", 10.0), {"name": "broken", "failure": "none"}]
    kernels = [ours("w4", 5.0, error=1e-3, of_copy_bandwidth=0.5), ours("w8", 20.0)]
    report: dict[str, Any] = {
        "gpu": "A card", "torch": "1", "triton": "2", "copy_bytes_per_s": 3e12,
        "host_launch_s": 9e-5, "host_torch_s": 1e-5,
        "rows": [
            {"group": "linear", "case": "M=1", "ours": kernels, "peers": peers},
            {"group": "linear", "case": "M=2", "skipped": True},
            {"group": "paged", "case": "S=1", "ours": [], "peers": [], "failure": "too large"},
        ],
    }  # fmt: skip
    made = page.markdown(report)
    assert "Changed since" not in made
    assert "- Tiles of w4." in page.markdown(report | {"since": ["Tiles of w4."]})
    assert "| M=1 | w4 | 5.0 | 2.00 | fast | 10.0 | 0.50 | 1.0e-03 |" in made
    assert "| M=1 | w8 | 20.0 | 0.50 | fast | 10.0 |  |  |" in made
    assert "| M=2 | not measured: no time was left |" in made
    assert "| S=1 | not measured: too large |" in made
    assert "A card, torch 1, Triton 2" in made and "90 us here" in made and "3.00 TB/s" in made


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_the_page_of_a_card_is_made_of_its_measurement(card: str):
    folder = Path(page.__file__).parent
    report = json.loads((folder / f"{card}.json").read_text("utf-8"))
    made = (folder.parents[2] / "docs" / f"kernels-{card}.md").read_text("utf-8")
    assert made == page.markdown(report)
    assert card.upper() in report["gpu"] and len(report["rows"]) > 40
