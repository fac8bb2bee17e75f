"""Profiles: figures are read as their authors mean them, and a table that cannot be true is refused
with its row. Other people's tables where they are there; small ones of our own always."""

import csv
import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest

from autoscale.catalog.coefficients import read_distserve, read_helix
from autoscale.catalog.grid import RateGrid, read_rate_table
from autoscale.catalog.kinds import read_kinds
from autoscale.catalog.memory import MemoryRoom
from autoscale.catalog.model import ModelSize
from autoscale.catalog.profile import Point, TableError, curve, interpolate
from autoscale.catalog.steps import read_profile, read_splitwise
from autoscale.placement.demand import Bucket, Slo
from autoscale.placement.plan import ReplicaShape

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no folder ../shared/data")
KINDS = read_kinds()
LLAMA_70B = ModelSize("llama2-70b", 80, 8192, 64, 8, 128, 28672, 32000)
ROOM = MemoryRoom(KINDS, LLAMA_70B)
ANY = Slo()


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(x, y, f"row {n}") for n, (x, y) in enumerate(pairs, 1)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (points((1, 1.0), (2, -0.1)), "row 2: -0.1 at 2 is negative"),
        (points((1, 1.0), (2, math.nan)), "row 2"),
        (points((1, 1.0), (1, 2.0)), "row 2: 1 is measured twice"),
        (points((1, 1.0), (2, 2.0), (3, 1.5)), "row 3: 1.5 at 3 is less than 2 at 2 (row 2)"),
        ([], "no rows"),
    ],
)
def test_what_cannot_be_true_is_refused_with_its_row(given: list[Point], words: str):
    with pytest.raises(TableError) as refusal:
        curve(given, 0.1)
    assert words in str(refusal.value)


def test_noise_is_let_pass_and_only_as_much_as_is_said():
    noisy = points((1, 1.0), (2, 0.92), (4, 1.3))
    assert curve(noisy, 0.1) == noisy
    with pytest.raises(TableError, match="noise of 5%"):
        curve(noisy, 0.05)


def test_between_measurements_lines_and_beyond_no_free_work():
    measured = points((2, 1.0), (4, 3.0), (8, 4.0))
    for x in np.linspace(2, 8, 50):
        assert interpolate(measured, x) == pytest.approx(np.interp(x, [2, 4, 8], [1, 3, 4]))
    assert interpolate(measured, 1) == 1.0
    # Beyond: 0.5 each from the origin is steeper than the last piece's 0.25.
    assert interpolate(measured, 16) == pytest.approx(4 + 8 * 0.5)


RATES = {"gpu": "x", "cost": 1, "indexes": [[4, 8], [128, 256]], "tputs": [[9, 5], [7, 3]]}


def write_rates(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({**RATES, **changes}))
    return path


def test_a_rate_is_that_of_the_next_longer_cell(tmp_path: Path):
    grid = RateGrid({"l4": read_rate_table(write_rates(tmp_path / "r.json"))}, "table")
    wanted = {(128, 4): 9, (1, 1): 9, (129, 4): 5, (128, 5): 7, (200, 8): 3, (257, 4): 0, (1, 9): 0}
    for (tokens_in, made), rate in wanted.items():
        assert grid.requests_per_s(ReplicaShape("l4"), Bucket(tokens_in, made), ANY) == rate
    assert grid.requests_per_s(ReplicaShape("l4", tensor=2), Bucket(1, 1), ANY) == 0
    with pytest.raises(ValueError, match="no table of the kind 't4'"):
        grid.requests_per_s(ReplicaShape("t4"), Bucket(1, 1), ANY)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tputs": [[9, 5], [7, -3]]}, "row of 8 output tokens: -3 at 256 input tokens"),
        ({"tputs": [[9, 5], [11, 3]]}, "row of 8 output tokens: 11 requests/s at 128"),
        ({"tputs": [[5, 9], [5, 3]]}, "row of 4 output tokens: 9 requests/s at 256"),
        ({"tputs": [[9, 5]]}, "1 rows for 2 outputs"),
        ({"tputs": [[9], [7]]}, "row of 4 output tokens: 1 figures for 2 inputs"),
        ({"tputs": [[9, "x"], [7, 3]]}, "row of 4 output tokens: 'x'"),
        ({"indexes": [[8, 4], [128, 256]]}, "outputs [8, 4] do not ascend"),
    ],
)
def test_a_bad_table_of_rates_is_refused_with_its_row(changes, words: str, tmp_path: Path):
    with pytest.raises(TableError) as refusal:
        read_rate_table(write_rates(tmp_path / "r.json", **changes))
    assert words in str(refusal.value)


MEASURED = """
source = "measured on a test"
model = "m"

[[replica]]
kind = "cpu"
kv_tokens = 4096
prefill = [{ tokens = 100, seconds = 0.1 }, { tokens = 200, seconds = 0.3 }]
decode = [
  { sequences = 1, context_tokens = 64, seconds = 0.01 },
  { sequences = 4, context_tokens = 64, seconds = 0.02 },
  { sequences = 1, context_tokens = 512, seconds = 0.02 },
  { sequences = 4, context_tokens = 512, seconds = 0.05 },
]
"""


def test_a_measured_table_is_read_between_its_points(tmp_path: Path):
    path = tmp_path / "p.toml"
    path.write_text(MEASURED)
    profile, shape = read_profile(path), ReplicaShape("cpu")
    assert profile.source == "measured on a test (model m)"
    assert profile.step_s(shape, 150, 0, 0) == pytest.approx(0.2)
    assert profile.step_s(shape, 0, 4, 512) == pytest.approx(0.05)
    assert profile.step_s(shape, 150, 4, 288) == pytest.approx(0.2 + (0.02 + 0.05) / 2)
    assert profile.step_s(shape, 0, 4, 960) == pytest.approx(0.05 + 0.03)
    assert profile.step_s(ReplicaShape("cpu", tensor=2), 1, 0, 0) == math.inf
    assert profile.requests_per_s(ReplicaShape("cpu", tensor=2), Bucket(10, 10), ANY) == 0
    assert profile.kv_tokens(shape) == 4096
    with pytest.raises(ValueError, match="no kind 'l4' was measured; there are cpu"):
        profile.kv_tokens(ReplicaShape("l4"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("seconds = 0.3", "seconds = -0.3"), "replica 1, prefill 2"),
        (("seconds = 0.3", "seconds = 0.01"), "replica 1, prefill 2: 0.01 at 200 is less"),
        (("seconds = 0.05", "seconds = 0.001"), "replica 1, decode 4"),
        (
            ("512, seconds = 0.02 }", "512, seconds = 0.002 }"),
            "replica 1, decode 3: 0.002 at a context of 512",
        ),
        (("kv_tokens", "kv_token"), "the nearest is kv_tokens"),
        (("tokens = 200", "tokens = 100"), "measured twice"),
    ],
)
def test_a_bad_measurement_is_refused_with_its_row(change, words: str, tmp_path: Path):
    path = tmp_path / "p.toml"
    path.write_text(MEASURED.replace(*change))
    with pytest.raises(ValueError) as refusal:
        read_profile(path)
    assert words in str(refusal.value)


@needs_data
@pytest.mark.data
def test_splitwise_medians_are_read_as_they_stand():
    path = DATA / "splitwise" / "perf_model.csv"
    profile = read_splitwise(path, "llama2-70b", ROOM, noise=0.2)
    with path.open() as file:
        rows = list(csv.DictReader(file))

    def median_s(column: str, **wanted: str) -> float:
        found = [r for r in rows if all(r[name] == value for name, value in wanted.items())]
        return statistics.median(float(row[column]) for row in found) / 1000

    for tensor in (4, 8):
        shape = ReplicaShape("a100-80g", tensor)
        where = {"model": "llama2-70b", "hardware": "a100-80gb", "tensor_parallel": str(tensor)}
        where |= {"token_size": "128"}
        for tokens in (512, 2048, 8192):
            wanted = median_s("prompt_time", prompt_size=str(tokens), batch_size="1", **where)
            assert profile.step_s(shape, tokens, 0, 0) == pytest.approx(wanted)
        for batch in (2, 16, 64):
            wanted = median_s("token_time", prompt_size="512", batch_size=str(batch), **where)
            assert profile.step_s(shape, 0, batch, 576) == pytest.approx(wanted, rel=0.01)
    with pytest.raises(TableError, match="h100-80gb, batch_size 64"):
        read_splitwise(path, "llama2-70b", ROOM, noise=0.1)


@needs_data
@pytest.mark.data
def test_distserve_coefficients_give_their_times():
    folder = DATA / "distserve"
    files = folder / "profiler-a100-80g.distserve.json", folder / "max_num_tokens.csv"
    profile = read_distserve(*files, "facebook/opt-13b")
    one = ReplicaShape("a100-80g")
    prompt_ms = 18.10254647486372 + 0.1019122572698738 * 512 + 7.122264314252114e-06 * 512**2 + 1
    assert profile.step_s(one, 512, 0, 0) == pytest.approx(prompt_ms / 1000)
    few_ms = 19.934702624895458 + 0.0006269356524350583 * 8 * 600 + 0.03850697740828398 * 8
    assert profile.step_s(one, 0, 8, 600) == pytest.approx(few_ms / 1000)
    many_ms = 7.1661889468253595 + 0.0005798000403396046 * 100 * 600 + 0.15831096191764046 * 100
    assert profile.step_s(one, 0, 100, 600) == pytest.approx(many_ms / 1000)
    assert profile.kv_tokens(one) == 66144
    assert profile.kv_tokens(ReplicaShape("a100-80g", 2, 2)) == 356752
    with pytest.raises(ValueError, match="only a100-80g was measured"):
        profile.kv_tokens(ReplicaShape("l4"))


def test_a_negative_coefficient_is_refused_with_its_row(tmp_path: Path):
    fit = {"prefill": [1, -1, 0], "decoding_smallbs": [1, 1, 1], "decoding_largebs": [1, 1, 1]}
    (tmp_path / "f.json").write_text(json.dumps({"m": {"2": fit}}))
    (tmp_path / "kv.csv").write_text("model,tp,pp,max_num_tokens\nm,2,1,100\n")
    with pytest.raises(TableError, match="m, tensor 2: prefill"):
        read_distserve(tmp_path / "f.json", tmp_path / "kv.csv", "m")
    with pytest.raises(ValueError, match="no model 'other'; there are m"):
        read_distserve(tmp_path / "f.json", tmp_path / "kv.csv", "other")


def write_helix(folder: Path, decode: str = "0,0\n2,4\n8,5\n") -> Path:
    for node in ("l4", "l4x2"):
        (folder / node).mkdir(parents=True, exist_ok=True)
        (folder / node / "prompt_bs2time.csv").write_text("0,0\n100,10\n200,18\n")
        (folder / node / "decode_bs2time.csv").write_text(decode)
    return folder


def test_layer_times_make_steps_of_all_layers(tmp_path: Path):
    profile = read_helix(write_helix(tmp_path / "m"), 80, ROOM)
    assert profile.layer_s("l4", "prefill", 150) == pytest.approx(0.014)
    assert profile.step_s(ReplicaShape("l4", tensor=2), 150, 5, 1) == pytest.approx(
        80 * (0.014 + 0.0045)
    )
    # Two stages work on half the sequences each at the same time.
    assert profile.step_s(ReplicaShape("l4", 1, 2), 0, 8, 1) == pytest.approx(
        80 * (0.004 + 2 / 6 * 0.001)
    )
    assert profile.step_s(ReplicaShape("l4", tensor=4), 1, 0, 0) == math.inf
    with pytest.raises(ValueError, match="no node 't4' was measured; there are l4, l4x2"):
        profile.kv_tokens(ReplicaShape("t4"))
    with pytest.raises(TableError, match="decode_bs2time.csv: line 3"):
        read_helix(write_helix(tmp_path / "m", "0,0\n2,4\n8,3\n"), 80, ROOM)


@needs_data
@pytest.mark.data
def test_helix_tables_are_read_and_their_noisy_rows_named():
    profile = read_helix(DATA / "helix" / "layer_times" / "llama1_30b", 60, ROOM)
    path = DATA / "helix" / "layer_times" / "llama1_30b" / "l4" / "decode_bs2time.csv"
    rows = [tuple(map(float, line.split(",")[:2])) for line in path.read_text().split()]
    for tokens, ms in random.Random(1).sample(rows[1:], 10):
        assert profile.layer_s("l4", "decode", tokens) == pytest.approx(ms / 1000)
    with pytest.raises(TableError, match=r"a100.decode_bs2time.csv: line 28"):
        read_helix(DATA / "helix" / "layer_times" / "llama2_70b", 80, ROOM)


@needs_data
@pytest.mark.data
def test_the_aibrix_tables_need_their_noise_allowed():
    path = DATA / "aibrix" / "simulator-llama2-7b-a40.json"
    with pytest.raises(TableError, match="row of 8 output tokens"):
        read_rate_table(path)
    table = read_rate_table(path, noise=0.3)
    assert table.rate(Bucket(256, 16)) == pytest.approx(22.75667452657716)
