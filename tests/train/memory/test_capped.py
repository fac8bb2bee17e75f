"""A process that may have 35 % of its job's state: offloaded it finishes, plain it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train import tiny
from tests.train.memory import capped
from train.memory.plan import disk_traffic
from train.memory.segments import lay_out
from train.precision import COMPUTE
from train.weights import read_start

MODEL = {"layers": 12, "hidden": 384, "heads": 6, "kv_heads": 6, "feed_forward": 1024}
SHARE = 0.35
STEPS = 3


def spec(tmp_path: Path, compute: str, **memory: Any) -> dict[str, Any]:
    job = tiny.job(
        model=MODEL,
        data={"sequence_tokens": 32},
        run={"tokens": 64 * STEPS, "batch_tokens": 64, "micro_batch_tokens": 64},
        precision={"compute": compute},
        memory=memory,
    )
    tiny.corpus(tmp_path / "corpus")
    return {
        "job": json.loads(job.model_dump_json()),
        "corpus": str(tmp_path / "corpus"),
        "folder": str(tmp_path / "run"),
        "steps": STEPS,
    }


def parameters() -> int:
    return sum(slot.stop - slot.start for slot in lay_out(config(), 1 << 24).slots)


def config() -> Any:
    return read_start(tiny.job(model=MODEL, data={"sequence_tokens": 32})).config


@pytest.mark.parametrize(
    ("offload", "compute", "state"), [("disk", "float64", 32), ("cpu", "bfloat16", 18)]
)
@pytest.mark.slow
def test_under_a_cap(offload: str, compute: str, state: int, tmp_path: Path):
    """state: bytes a parameter of the plain run: weights, masters, gradient, moments. The cap is on
    what the job adds to the interpreter and torch, whose own share would be most of a small test;
    `make prove-parallel` caps all of it."""
    cap = round(SHARE * state * parameters())
    folder = {"folder": str(tmp_path / "host")}
    wanted = spec(tmp_path, compute, offload=offload, **folder)
    plain = spec(tmp_path, compute)
    finished = capped.run(**wanted, beyond_bytes=cap)
    assert finished.returncode == 0, finished.stderr[-2000:]
    refused = capped.run(**plain, beyond_bytes=cap)
    assert refused.returncode == 1 and "memory" in refused.stderr.lower(), refused.stderr[-500:]
    expected = json.loads(capped.run(**plain).stdout)["losses"]
    found = json.loads(finished.stdout)
    assert found["losses"] == pytest.approx(expected, rel=1e-12)
    if offload == "disk":
        _is_as_planned(found, compute)


def _is_as_planned(found: dict[str, Any], compute: str) -> None:
    """The steps after the first, which may find blocks that were never written."""
    plan = disk_traffic(lay_out(config(), 1 << 24), COMPUTE[compute], 1, workers=1)
    assert found["counted"][-1] == [plan.read_bytes, plan.written_bytes]
    if not found["direct"]:
        pytest.skip("the file system here takes no O_DIRECT: the page cache hides what is moved")
    for measured, planned in zip(found["moved"][-1], found["counted"][-1], strict=True):
        assert planned <= measured * 1.001 and measured <= planned * 1.1
