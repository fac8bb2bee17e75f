"""The live drill in small: the control loop, a tiny random model in real processes, and a market of
our own that takes some of them by SIGKILL. tests/prove/drill.py is the same over a recorded trace.
"""

import asyncio
import random
from pathlib import Path

import pytest

from autoscale.catalog.offer import Offer
from autoscale.providers.local.market import LocalMarket, Step
from cluster.settings import Settings
from cluster.settings.autoscale import AutoscaleSettings
from serve.engine.sequence import Request, Sampling
from tests.models.tiny import write_byte_level
from tests.prove.drill_run import Scene, disturbed, replayed, undisturbed
from tests.serving.tiny import request, settings

NOTICE_S = 0.3
SPOT_A = Offer("spot-a", "cpu", 1, "here", "a", "spot", 0.3, startup_s=1.0)
SPOT_B = Offer("spot-b", "cpu", 1, "here", "b", "spot", 0.3, startup_s=1.0)
ON_DEMAND = Offer("on-demand", "cpu", 1, "here", "a", "on_demand", 1.0, startup_s=1.0)


def tiny_request(number: int) -> Request:
    """Greedy or seeded, of no tokens but those of the small vocabulary."""
    rng = random.Random(number)
    prompt = [rng.randrange(2, 250) for _ in range(rng.randint(20, 60))]
    sampling = Sampling(rng.choice([0.0, 1.0]), seed=number)
    return request(f"r{number}", prompt, rng.randint(320, 380), sampling, ignore_eos=True)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    given = settings(prefill=0, kv_tokens=4096, budget_tokens=64).model_dump()
    model = write_byte_level(tmp_path / "tiny.gguf")
    given |= {"model": str(model), "data_dir": str(tmp_path)}
    given["controller"]["period_s"] = 0.1
    market = LocalMarket(
        (SPOT_A, SPOT_B, ON_DEMAND),
        (Step(0.0, "spot-a", 1), Step(0.0, "spot-b", 1), Step(3.0, "spot-a", 0)),
        NOTICE_S,
    )
    autoscale = AutoscaleSettings.model_validate(
        {
            "policy": "spothedge",
            "over": 0,
            "period_s": 0.1,
            "drain_s": 2.0,
            "decode": {"floor": 2, "cap": 2},
            "prefill": {"cap": 0},
        }
    )
    return Scene(
        Settings.model_validate(given), autoscale, market, tiny_request, 6, 9.0, quiet_machines=1
    )


def test_nothing_is_lost_when_machines_are(scene: Scene, tmp_path: Path):
    hit = asyncio.run(disturbed(scene, tmp_path / "hit"))
    assert hit.killed == 1 == hit.noticed and hit.left_over == 0
    assert hit.lost == {} and hit.moved > 0 and len(hit.tokens) > 6
    quiet = asyncio.run(undisturbed(scene, tmp_path / "quiet", sorted(hit.tokens)))
    assert hit.tokens == quiet.tokens
    more = max(hit.prompt_tokens - quiet.prompt_tokens, hit.recomputed_tokens)
    moved = f"{hit.moved} moved, {hit.with_pages} with their pages"
    print(f"{len(hit.tokens)} requests, {moved}, {more} of {quiet.computed_tokens} tokens again")
    assert more <= 0.1 * quiet.computed_tokens
    alike, steps = replayed(hit.log)
    assert alike == steps > 10
    assert replayed([*hit.log[:1], *hit.log[2:]])[0] < steps - 1, "a step less is another history"
