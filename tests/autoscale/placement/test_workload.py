"""Workload files: the problem is what the file says, mistakes are refused in a sentence, and a
trace becomes the histogram that counting it by hand gives."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from autoscale.catalog.profile import LayerTimes, StepTimes
from autoscale.placement.demand import Bucket
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.registry import PLANNERS
from autoscale.placement.workload import read_workload

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data"
EXAMPLES = ROOT / "docs" / "examples"

OFFERS = """
[[offer]]
name = "a"
kind = "l4"
usd_per_h = 0.8

[[offer]]
name = "b"
kind = "a10g"
count = 4
usd_per_h = 5.6
"""
WORKLOAD = """
[model]
name = "small-8b"
layers = 32
hidden = 4096
heads = 32
kv_heads = 8
head_dim = 128
feed_forward = 14336
vocab = 128256

[slo]
ttft_s = 1.0

[[bucket]]
input_tokens = 128
output_tokens = 64
requests_per_s = 2.0

[[bucket]]
input_tokens = 128
output_tokens = 64
requests_per_s = 1.0

[offers]
file = "offers.toml"

[shapes]
weight_bits = [8]
"""


def write(folder: Path, text: str = WORKLOAD) -> Path:
    (folder / "offers.toml").write_text(OFFERS)
    path = folder / "w.toml"
    path.write_text(text)
    return path


def test_the_problem_is_what_the_file_says(tmp_path: Path):
    read = read_workload(write(tmp_path))
    problem = read.problem
    assert problem.demand.requests_per_s == {Bucket(128, 64): 3.0}
    assert (problem.demand.slo.ttft_s, problem.demand.slo.tpot_s) == (1.0, None)
    assert [offer.source for offer in problem.catalog.offers()] == ["offers.toml"] * 2
    assert set(problem.shapes) == {
        ReplicaShape("l4", 1, weight_bits=8),
        *(ReplicaShape("a10g", tensor, weight_bits=8) for tensor in (1, 2, 4)),
    }
    assert problem.model is not None and problem.model.parameters == pytest.approx(8.03e9, rel=0.01)
    assert read.planner == "aggregate" and read.deadline_s == 10
    assert isinstance(problem.profile, StepTimes) and isinstance(problem.profile, LayerTimes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[slo]", "[slos]"), "slos is no known key; the nearest is slo"),
        (("ttft_s", "ttft"), "slo, ttft is no known key; the nearest is ttft_s"),
        (("ttft_s = 1.0", "ttft_s = 0"), "slo, ttft_s = 0 is not accepted"),
        (("requests_per_s = 2.0", "requests_per_s = -2.0"), "bucket 1, requests_per_s = -2.0"),
        (("requests_per_s = 2.0", ""), "bucket 1, requests_per_s is missing"),
        (("input_tokens", "input_token"), "bucket 1, input_token is no known key"),
        (("heads = 32\n", "heads = 30\n"), "heads = 30 has to be a multiple"),
        (('"offers.toml"', '"offer.toml"'), "cannot read"),
        (("[shapes]", '[profile]\nfrom = "rates"\n[shapes]'), 'from = "rates" needs files too'),
        (("[shapes]", '[profile]\nfrm = "rates"\n[shapes]'), "the nearest is from"),
        (("[shapes]", '[profile]\nfrom = "guess"\n[shapes]'), "profile, from = 'guess'"),
        (("[shapes]", '[trace]\nfile = "t"\nrequests_per_s = 1\n[shapes]'), "either [[bucket]]"),
    ],
)
def test_a_mistake_is_refused(change: tuple[str, str], words: str, tmp_path: Path):
    with pytest.raises(ValueError) as refusal:
        read_workload(write(tmp_path, WORKLOAD.replace(*change)))
    assert words in str(refusal.value)


TRACE = """
[trace]
file = "trace.csv"
requests_per_s = 10.0
input_edges = [100, 1000]
output_edges = [10]
"""


def with_trace(rows: str, folder: Path) -> Path:
    (folder / "trace.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    start, end = WORKLOAD.index("[[bucket]]"), WORKLOAD.index("[offers]")
    return write(folder, WORKLOAD[:start] + TRACE + WORKLOAD[end:])


def test_a_trace_is_counted_into_buckets(tmp_path: Path):
    path = with_trace("t,100,10\nt,101,1\nt,99,10\nt,1000,9\n", tmp_path)
    rates = read_workload(path).problem.demand.requests_per_s
    assert rates == {Bucket(100, 10): 5.0, Bucket(1000, 10): 5.0}
    with pytest.raises(ValueError, match="1001 tokens is beyond the edges"):
        read_workload(with_trace("t,1001,10\n", tmp_path))
    with pytest.raises(ValueError, match="cannot read .* as a trace"):
        read_workload(with_trace("t,x,10\n", tmp_path))


@pytest.mark.skipif(not DATA.is_dir(), reason="no folder ../shared/data")
@pytest.mark.data
def test_the_azure_trace_keeps_its_requests(tmp_path: Path):
    source = DATA / "azure-llm" / "AzureLLMInferenceTrace_code.csv"
    text = TRACE.replace("trace.csv", str(source)).replace("[100, 1000]", "[1024, 8192]")
    start, end = WORKLOAD.index("[[bucket]]"), WORKLOAD.index("[offers]")
    path = write(tmp_path, WORKLOAD[:start] + text.replace("[10]", "[64, 4096]") + WORKLOAD[end:])
    with source.open() as file:
        rows = [(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in csv.DictReader(file)]
    counts = Counter((1024 if i <= 1024 else 8192, 64 if o <= 64 else 4096) for i, o in rows)
    rates = read_workload(path).problem.demand.requests_per_s
    assert rates == {Bucket(*b): pytest.approx(10 * n / len(rows)) for b, n in counts.items()}


@pytest.mark.parametrize("name", ["chat-8b", "laptop"])
def test_the_examples_can_be_read(name: str):
    problem = read_workload(EXAMPLES / f"{name}.toml").problem
    assert problem.shapes
    for bucket in problem.demand.requests_per_s:
        assert any(
            problem.profile.requests_per_s(shape, bucket, problem.demand.slo) > 0
            for shape in problem.shapes
        )


@pytest.mark.parametrize("name", PLANNERS.names())
def test_a_planner_of_each_name_is_there(name: str):
    assert PLANNERS.load(name)().plan
