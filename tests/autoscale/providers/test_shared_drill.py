"""One allocator in small: the loop, a tiny random model and a tiny job, all in real processes.
tests/prove/train_shared.py is the same with SmolLM2, beside a job that may not yield."""

import asyncio
from pathlib import Path

import pytest

from autoscale.loop.actions import Return, Yield
from autoscale.loop_view import explain_decision
from cluster.settings import Settings
from cluster.settings.autoscale import AutoscaleSettings
from tests.autoscale.providers.test_drill import tiny_request
from tests.models.tiny import write_byte_level
from tests.prove.drill_run import Scene, undisturbed
from tests.prove.shared_run import MARKET, Drill, play, quietly
from tests.prove.train_shared import AUTOSCALE, compared, replicas
from tests.serving.tiny import settings
from tests.train.elastic.tiny import Tiny

STEPS = 260


@pytest.mark.slow
@pytest.mark.live
def test_a_machine_is_lent_to_serving_and_returned(tmp_path: Path, capsys):
    given = settings(prefill=0, kv_tokens=4096, budget_tokens=64, max_running=2).model_dump()
    model = write_byte_level(tmp_path / "tiny.gguf")
    given |= {"model": str(model), "data_dir": str(tmp_path)}
    given["controller"]["period_s"] = 0.1
    autoscale = {**AUTOSCALE, "period_s": 0.1, "backlog_s": 0.1, "up_delay_s": 0.5}
    scene = Scene(
        Settings.model_validate(given),
        AutoscaleSettings.model_validate(autoscale),
        MARKET,
        tiny_request,
        streams=12,
        lasts_s=0.0,
    )
    job = Tiny(tmp_path / "job", STEPS, 0.1)
    job.folder.mkdir()
    drill = Drill(scene, job, spikes=1, held_s=2.0)
    shares = play(drill, tmp_path / "shared")
    for row in compared(drill, shares):
        print(row)
        assert row.ok, row
    assert shares.served.lost == {} and replicas(shares) == [1, 2, 1]
    assert shares.alive == shares.served.left_over == 0
    numbers = sorted(shares.served.tokens)
    quiet = asyncio.run(undisturbed(quietly(drill), tmp_path / "quiet", numbers))
    assert quiet.tokens == shares.served.tokens
    [(step, _)] = shares.asked(Yield)
    assert shares.asked(Return)
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join(shares.served.log) + b"\n")
    capsys.readouterr()
    assert explain_decision(log, str(step.decision.number)) == 0
    told = capsys.readouterr().out
    assert "training: tiny holds 2 of 2, runs on 1" in told and "yield m-" in told
