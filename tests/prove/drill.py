"""Proof rows of the live drill: the control loop serves SmolLM2 on machines that a recorded trace
takes away (SpotServe's As, ten times as fast), each ended by SIGKILL at its deadline.

The trace's nodes are two zones here, by even and odd numbers, of at most two machines each, so
that two cores can serve it. Nothing is sold on demand: as in the trace's own experiment, what is
taken is missing until the market has more. Notices are of SpotServe's 30 s, as fast as the rest.
The same requests are then asked of machines that stay.
"""

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from autoscale.catalog.offer import Offer
from autoscale.providers.local.market import LocalMarket, read_spotserve, scaled
from cluster.settings import Settings
from cluster.settings.autoscale import AutoscaleSettings
from models.load import load_text
from serve.engine.sequence import Limits, Request, Sampling
from serve.kv.prefix import CacheKey
from tests.prove.drill_run import Outcome, Scene, disturbed, replayed, undisturbed
from tests.prove.row import Row

TRACE = Path(__file__).parents[3] / "shared/data/spotserve/trace_seg/trace_0304_real.txt"
COMPRESS = 10.0
LASTS_S = 1320 / COMPRESS
NOTICE_S = 30 / COMPRESS
STARTUP_S = 6.0
MOST = 2  # machines of a zone
STREAMS = 8
KILLS = 3  # one at 600 s, one of each zone at 1200 s
SETTINGS = {
    "engine": {"kv_tokens": 4096},
    "prefill": {"replicas": 0},
    "decode": {"threads": 1},
    "controller": {"period_s": 0.2},
}
AUTOSCALE = {
    "period_s": 0.5,
    "up_delay_s": 4.0,
    "down_delay_s": 60.0,
    "give_up_s": 300.0,
    "drain_s": 6.0,
    "decode": {"floor": 4, "cap": 4},
    "prefill": {"cap": 0},
}
TOPICS = ("the tide", "a lighthouse", "sea birds", "an old harbour", "the moon", "salt", "storms")


def rows() -> Iterator[Row]:
    """Every row of this module; about six minutes."""
    if not TRACE.exists():
        yield Row("live drill over As", "run", f"no {TRACE}", False)
        return
    with TemporaryDirectory(prefix="drill-") as folder:
        scene = _scene()
        hit = asyncio.run(disturbed(scene, Path(folder, "hit")))
        quiet = asyncio.run(undisturbed(scene, Path(folder, "quiet"), sorted(hit.tokens)))
    yield from compared(hit, quiet, KILLS)


def compared(hit: Outcome, quiet: Outcome, kills: int) -> Iterator[Row]:
    """What a drill is held to."""
    begun = len(hit.tokens.keys() | hit.lost.keys())
    text = f"{hit.killed} of {hit.launched} launched, {hit.noticed} told before"
    yield Row("drill: machines ended by SIGKILL", f">= {kills}", text, hit.killed >= kills)
    first = "".join(f"; {number}: {why}" for number, why in list(hit.lost.items())[:2])
    ok = begun > 0 and not hit.lost and not quiet.lost
    yield Row("drill: requests lost", "0", f"{len(hit.lost)} of {begun}{first}", ok)
    text = f"{hit.moved}, {hit.with_pages} of them with their pages"
    yield Row("drill: requests that went on elsewhere", "> 0", text, hit.moved > 0)
    different = [n for n, tokens in hit.tokens.items() if tokens != quiet.tokens.get(n)]
    ok = bool(hit.tokens) and not different
    text = f"{len(different)} different of {len(hit.tokens)}"
    yield Row("drill: tokens = undisturbed", "0 different", text, ok)
    more = max(hit.prompt_tokens - quiet.prompt_tokens, hit.recomputed_tokens)
    share = more / quiet.computed_tokens
    text = f"{share:.1%} ({more} of {quiet.computed_tokens})"
    yield Row("drill: tokens recomputed", "<= 10 %", text, share <= 0.1)
    alike, steps = replayed(hit.log)
    text = f"{alike} of {steps} decisions"
    yield Row("drill: the log replays byte for byte", "all", text, alike == steps > 0)
    text = f"{hit.left_over + quiet.left_over} processes"
    yield Row("drill: machines left over", "0", text, hit.left_over + quiet.left_over == 0)


def _scene() -> Scene:
    zones = {"a": lambda node: _number(node) % 2 == 0, "b": lambda node: _number(node) % 2 == 1}
    offers = tuple(
        Offer(f"spot-{zone}", "t4", 1, "as", zone, "spot", 0.16, startup_s=STARTUP_S)
        for zone in zones
    )
    steps = [
        step
        for zone, chosen in zones.items()
        for step in scaled(
            read_spotserve(TRACE, chosen), f"spot-{zone}", most=MOST, compress=COMPRESS
        )
    ]
    market = LocalMarket(offers, tuple(sorted(steps, key=lambda step: step.t_s)), NOTICE_S)
    settings = Settings.model_validate(SETTINGS)
    return Scene(
        settings,
        AutoscaleSettings.model_validate(AUTOSCALE),
        market,
        requests_of(settings),
        STREAMS,
        LASTS_S,
    )


def requests_of(settings: Settings) -> Callable[[int], Request]:
    """An endless list of requests to the settings' model, greedy and seeded, long and short."""
    tokenizer = load_text(settings.model).tokenizer

    def asked(number: int) -> Request:
        chance = random.Random(number)
        topics = ", then of ".join(chance.sample(TOPICS, 4))
        lines = " ".join(f"Letter {n} has {chance.randrange(99)} words." for n in range(8))
        text = f"{number}. {lines} Write to a friend, first of {topics}."
        seeded = Sampling(chance.choice([0.0, 0.8]), seed=number)
        limits = Limits(chance.randint(64, 160), ignore_eos=True)
        prompt = tuple(tokenizer.encode(text))
        return Request(f"drill-{number}", prompt, seeded, limits, CacheKey("drill", "", ""))

    return asked


def _number(node: str) -> int:
    return int(node.rpartition("-")[2])
