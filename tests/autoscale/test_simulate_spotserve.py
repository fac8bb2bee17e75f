"""Rerouting and migrating: plans against the published ones, and what a loss does to either."""

import json

import numpy as np
import pytest

from autoscale.simulate.plans import Config, LayerTimes, best_config, read_layer_times
from autoscale.simulate.spotserve import Change, Serving, Site, Way
from tests.autoscale.spot_markets import DATA

SPOTSERVE = DATA / "spotserve"
TIMES = LayerTimes(
    layers=8,
    padded_layers=8,
    factor=1.0,
    first_hop_ms=0.0,
    next_hop_ms=0.0,
    embed_ms=(0.0,) * 4,
    first_ms={
        (tensor, batch): 40.0 * batch / tensor for tensor in (1, 2, 4) for batch in (1, 2, 4)
    },
    next_ms={(tensor, batch): 8.0 / tensor for tensor in (1, 2, 4) for batch in (1, 2, 4)},
    most_tensor=4,
    fewest=4,
    weight_bytes=40e9,
)


@pytest.mark.data
def test_plans_are_the_published_ones():
    if not SPOTSERVE.is_dir():
        pytest.skip(f"{SPOTSERVE} is not here")
    rows = json.loads((SPOTSERVE / "oracle_plans_T4-4x.json").read_text(encoding="utf-8"))
    models = {"6.7B": ("megatron_6.7B", 4), "20B": ("megatron_h6144", 12)}
    assert len(rows) >= 20
    for row in rows:
        profile, fewest = models[row["model"]]
        path = SPOTSERVE / "profile" / "T4-4x" / f"{profile}_profile.json"
        times = read_layer_times(path, fewest, 1e9)
        found = best_config(times, row["gpus"], row.get("min_tpt", 1.0), 128)
        if row.get("plan", row) is None:
            assert found is None
            continue
        wanted = Config(*(row[key] for key in ("dp", "tp", "pp", "batch", "m1", "m2")))
        assert found == wanted
        latency_ms = times.latency_s(found, found.batch, 128) * 1000
        assert latency_ms == pytest.approx(row["latency_ms"], abs=0.01)


def test_a_plan_is_the_best_of_all():
    for count in (4, 8, 12, 20):
        for rate in (0.5, 5.0):
            options = [
                Config(count // (tensor * pipe), tensor, pipe, batch, first, later)
                for tensor in (1, 2, 4)
                for pipe in (1, 2, 4, 8)
                for batch in (1, 2, 4)
                for first in (1, 2, 4)
                for later in (1, 2, 4)
                if 4 <= tensor * pipe <= count and first <= batch and later <= batch
            ]

            def latency_s(c: Config) -> float:
                layers = 8 // c.pipeline
                first = 40.0 * (c.batch // c.cut_first) / c.tensor * layers
                first *= (c.pipeline + c.cut_first - 1) / c.cut_first
                later = 8.0 / c.tensor * layers * (c.pipeline + c.cut_next - 1)
                return (first + 64 * later) / 1000

            keeping = [c for c in options if c.copies * c.batch / latency_s(c) >= rate]
            found = best_config(TIMES, count, rate, 64)
            assert found is not None
            if keeping:
                assert latency_s(found) == pytest.approx(min(map(latency_s, keeping)))
            else:
                best = max(c.copies * c.batch / latency_s(c) for c in options)
                assert found.copies * found.batch / latency_s(found) == pytest.approx(best)


def served(way: Way, changes: list[Change], gap_s: float = 0.5) -> Serving:
    serving = Serving(way, TIMES, Site(), 1.0, 64)
    serving.run(np.arange(0, 300, gap_s).tolist(), changes, 300.0)
    return serving


THERE = Change(0.0, ("a", "b", "c"), ())


@pytest.mark.parametrize("way", ["rerouting", "migrating"])
def test_nothing_is_lost(way: Way):
    changes = [
        THERE,
        Change(60.0, (), ("b",)),
        Change(120.0, ("d",), ()),
        Change(200.0, (), ("a",)),
    ]
    serving = served(way, changes)
    assert len(serving.latencies_s) == 600
    assert serving.machine_s == pytest.approx(3 * 60 + 2 * 60 + 3 * 80 + 2 * 100)


def test_an_undisturbed_run_is_the_same_either_way():
    runs = [served(way, [THERE]) for way in ("rerouting", "migrating")]
    assert sorted(runs[0].latencies_s) == pytest.approx(sorted(runs[1].latencies_s))


def test_only_rerouting_computes_again():
    changes = [THERE, *(Change(60.0 + 40 * n, (f"e{n}",), (("a", "b", "c")[n],)) for n in range(3))]
    rerouting, migrating = served("rerouting", changes, 0.3), served("migrating", changes, 0.3)
    assert rerouting.recomputed_tokens > 0 == migrating.recomputed_tokens
    assert np.percentile(rerouting.latencies_s, 99) > np.percentile(migrating.latencies_s, 99)


def test_rerouting_keeps_the_shape_it_was_planned_with():
    """On two machines: one accelerator group each when planned for them, one pipeline over both
    when planned for four; migrating takes no notice of it."""

    def pipelines(way: Way, planned: int) -> list[tuple[int, int]]:
        serving = Serving(way, TIMES, Site(planned=planned), 6.0, 64)
        serving.run([0.0], [Change(0.0, ("a", "b"), ())], 10.0)
        return [(p.config.tensor, p.config.pipeline) for p in serving.pipelines]

    assert pipelines("rerouting", 0) == pipelines("rerouting", 2) == [(4, 1), (4, 1)]
    assert pipelines("rerouting", 4) == [(4, 2)]
    assert pipelines("migrating", 4) == pipelines("migrating", 0) == [(4, 1), (4, 1)]
