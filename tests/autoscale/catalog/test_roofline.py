"""The roofline against sums by hand, and against what was measured on such a card."""

import math
from pathlib import Path

import pytest

from autoscale.catalog.coefficients import read_distserve
from autoscale.catalog.kinds import read_kinds
from autoscale.catalog.model import ModelSize
from autoscale.catalog.roofline import Roofline
from autoscale.placement.plan import ReplicaShape

DATA = Path(__file__).parents[4] / "shared" / "data"
KINDS = read_kinds()
OPT_13B = ModelSize("opt-13b", 40, 5120, 40, 40, 128, 20480, 50272, 2)
A100 = ReplicaShape("a100-80g")


def test_model_sizes_are_those_that_are_published():
    """Billions of parameters of models whose shapes are written out."""
    sizes = {
        OPT_13B: 12.85,
        ModelSize("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000): 6.74,
        ModelSize("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000): 68.98,
        ModelSize("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256): 8.03,
    }
    for model, billions in sizes.items():
        tables = 1 if model is OPT_13B else 2
        counted = model.parameters - (2 - tables) * model.embedding_parameters
        assert counted / 1e9 == pytest.approx(billions, rel=0.005), model.name
    assert OPT_13B.kv_bytes_per_token == 2 * 40 * 5120 * 2


def test_decoding_is_bound_by_memory_and_a_prompt_by_arithmetic():
    roofline = Roofline(KINDS, OPT_13B, 0.5, 0.7)
    layers = 40 * (4 * 5120**2 + 2 * 5120 * 20480)
    head = 50272 * 5120
    read = 2 * layers + 2 * head + 40 * 2 * 5120 * 2 * 8 * 600
    assert roofline.step_s(A100, 0, 8, 600) == pytest.approx(read / (2039e9 * 0.7), rel=0.01)
    scores = 40 * 4 * 5120 * 1000**2 / 2
    wanted_s = (2 * layers * 1000 + scores) / (312e12 * 0.5) + 2 * head / (2039e9 * 0.7)
    assert roofline.step_s(A100, 1000, 0, 0) == pytest.approx(wanted_s, rel=0.01)


def test_eight_bits_are_read_in_half_the_time_and_four_share_the_work():
    roofline = Roofline(KINDS, OPT_13B)
    whole_s = roofline.step_s(A100, 0, 1, 10)
    assert roofline.step_s(ReplicaShape("a100-80g", weight_bits=8), 0, 1, 10) < 0.55 * whole_s
    shared_s = roofline.step_s(ReplicaShape("a100-80g", tensor=4), 0, 1, 10)
    messages_s = 40 * 2 * (1e-5 + 2 * 3 / 4 * 5120 * 2 / 300e9)
    assert shared_s == pytest.approx(whole_s / 4 + messages_s)


def test_it_says_what_it_is():
    assert Roofline(KINDS, OPT_13B).source.startswith("roofline")


@pytest.mark.skipif(not DATA.is_dir(), reason="no folder ../shared/data")
@pytest.mark.data
def test_it_is_within_a_half_of_what_distserve_measured_on_one_card():
    folder = DATA / "distserve"
    files = folder / "profiler-a100-80g.distserve.json", folder / "max_num_tokens.csv"
    measured = read_distserve(*files, "facebook/opt-13b")
    roofline = Roofline(KINDS, OPT_13B)
    ratios = [
        roofline.step_s(A100, *step) / measured.step_s(A100, *step)
        for step in ((128, 0, 0), (512, 0, 0), (2048, 0, 0), (0, 1, 512), (0, 32, 512))
    ]
    assert all(abs(math.log(ratio)) < math.log(1.6) for ratio in ratios), ratios
    assert roofline.kv_tokens(A100) == pytest.approx(measured.kv_tokens(A100), rel=0.25)
