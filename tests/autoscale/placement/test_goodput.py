"""Simulated queues against formulas, and small schedules against what they come to by hand."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from autoscale.placement.demand import Slo
from autoscale.placement.goodput import (
    Arrival,
    Coefficients,
    Replica,
    Served,
    attained,
    colocated,
    decode,
    disaggregated,
    goodput,
    mean_ttft_s,
    poisson,
    prefill,
)
from autoscale.placement.goodput_advice import advise


@dataclass(frozen=True)
class Plain:
    """Prompts: 1 s and 0.01 s a token; a pass: 0.1 s and 0.1 s a sequence."""

    def prompt_s(self, lengths: Sequence[int]) -> float:
        return 1.0 + 0.01 * sum(lengths)

    def decode_s(self, sequences: float, context_tokens: float) -> float:
        return 0.1 + 0.1 * sequences


PLAIN = Replica(Plain(), kv_tokens=1000, batch_tokens=100)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("busy", [0.3, 0.7])
def test_waiting_is_that_of_an_md1_queue(busy: float, stages: int):
    prompt_s = Plain().prompt_s([100])
    rate = busy * stages / prompt_s
    arrivals = poisson([(100, 1)] * 100_000, rate, seed=int(busy * 10))
    replica = Replica(Plain(), 1000, stages, batch_tokens=1)
    first_s = prefill(arrivals, [replica])
    mean = float(np.mean([f - a.at_s for f, a in zip(first_s, arrivals, strict=True)]))
    assert mean == pytest.approx(mean_ttft_s(prompt_s, rate, stages), rel=0.02)


def test_a_saturated_queue_waits_for_ever():
    assert mean_ttft_s(0.5, 2.0) == float("inf")
    assert mean_ttft_s(0.5, 0.0) == 0.5


def test_prompts_that_wait_are_computed_together_up_to_the_limit():
    """The first alone, 0 to 1.5 s; then two of 50 tokens, 2 s; the last alone."""
    arrivals = [Arrival(0.1 * n, 50, 2) for n in range(4)]
    assert prefill(arrivals, [PLAIN]) == pytest.approx([1.5, 3.5, 3.5, 5.0])


def test_prompts_go_to_the_replica_with_the_least_work():
    arrivals = [Arrival(0.0, 100, 2), Arrival(0.1, 10, 2), Arrival(0.2, 10, 2)]
    first_s = prefill(arrivals, [PLAIN, PLAIN])
    assert first_s[:2] == pytest.approx([2.0, 1.2])
    assert first_s[2] == pytest.approx(1.2 + 1.1)


def test_decoding_joins_running_batches():
    """Two passes alone at 0.2 s; the second comes, both at 0.3 s, until the first has its fifth."""
    arrivals = [Arrival(0.0, 10, 5), Arrival(0.0, 10, 3)]
    assert decode(arrivals, [0.0, 0.3], [PLAIN]) == pytest.approx([1.0, 1.0])


def test_decoding_waits_where_keys_and_values_do_not_fit():
    small = Replica(Plain(), kv_tokens=20)
    arrivals = [Arrival(0.0, 10, 3), Arrival(0.0, 10, 3)]
    assert decode(arrivals, [0.0, 0.0], [small]) == pytest.approx([0.4, 0.8])
    assert decode(arrivals, [0.0, 0.0], [PLAIN]) == pytest.approx([0.6, 0.6])


def test_together_a_prompt_stops_the_others():
    """A's prompt ends at 1.5 s; B comes at 1.6 in a pass; its prompt delays A's next token."""
    arrivals = [Arrival(0.0, 50, 4), Arrival(1.6, 50, 2)]
    served = colocated(arrivals, [PLAIN])
    assert served[0].ttft_s == pytest.approx(1.5)
    # 1.7 a pass alone, 3.2 B's prompt, 3.5 and 3.8 passes; B has its second token at 3.5.
    assert served[0].tpot_s == pytest.approx((3.7 - 1.5) / 3)
    assert served[1].ttft_s == pytest.approx(3.2 - 1.6)
    apart = disaggregated(arrivals, [PLAIN], [PLAIN])
    assert apart[0].tpot_s < served[0].tpot_s


def test_the_hand_over_delays_the_second_token():
    arrivals = [Arrival(0.0, 50, 3)]
    at_once = disaggregated(arrivals, [PLAIN], [PLAIN])[0]
    later = disaggregated(arrivals, [PLAIN], [PLAIN], lambda tokens: tokens / 100)[0]
    assert later.ttft_s == at_once.ttft_s
    assert later.tpot_s == pytest.approx(at_once.tpot_s + 0.5 / 2)


def test_an_answer_of_one_token_is_over_with_its_prompt():
    arrivals = [Arrival(0.0, 50, 1), Arrival(0.0, 50, 1)]
    for served in (colocated(arrivals, [PLAIN]), disaggregated(arrivals, [PLAIN], [PLAIN])):
        assert [s.tpot_s for s in served] == [0.0, 0.0]


def test_attained_counts_requests_within_both():
    served = [Served(1.0, 0.1), Served(1.0, 0.3), Served(3.0, 0.1), Served(1.5, 0.2)]
    assert attained(served, Slo(2.0, 0.2)) == 0.5
    assert attained(served, Slo(None, 0.2)) == 0.75


def test_goodput_is_where_the_limit_is_crossed():
    """Served within the limit below 3.21 requests per second only."""

    def serve(arrivals: Sequence[Arrival]) -> list[Served]:
        rate = len(arrivals) / arrivals[-1].at_s
        return [Served(rate, 0.0)] * len(arrivals)

    lengths = [(1, 1)] * 2000
    spread = len(lengths) / poisson(lengths, 1.0)[-1].at_s
    found = goodput(serve, lengths, Slo(ttft_s=3.21), most=20, tolerance=1e-4)
    assert found * spread == pytest.approx(3.21, rel=1e-3)
    assert goodput(serve, lengths, Slo(ttft_s=1e-9), most=20) == 0.0


def test_coefficients_as_published_profiles_have_them():
    times = Coefficients((18.0, 0.1, 7e-6), (20.0, 6e-4, 0.04), (7.0, 5e-4, 0.16), 95)
    assert times.prompt_s([100, 200]) == pytest.approx((18 + 30 + 7e-6 * 50_000) / 1000)
    assert times.decode_s(94, 1000) == pytest.approx((20 + 0.6 + 3.76) / 1000)
    assert times.decode_s(95, 1000) == pytest.approx((7 + 0.5 + 15.2) / 1000)


A100 = Coefficients((18.1, 0.102, 7.1e-6), (19.9, 6.3e-4, 0.0385), (7.2, 5.8e-4, 0.158), 95)


def test_advice_for_and_against():
    """Long prompts and a tight time per token: apart. Long answers to short prompts on two
    replicas: one of them would idle."""
    replica = Replica(A100, 66_000)
    apart = advise(replica, 3, [(512, 64)] * 300, Slo(0.4, 0.04))
    assert apart.disaggregate and apart.apart_per_s > 1.3 * apart.together_per_s
    assert apart.sentence().startswith("Disaggregate: 2 prefill and 1 decode replicas serve ")
    against = advise(replica, 2, [(32, 400)] * 300, Slo(1.0, 0.08))
    assert not against.disaggregate
    assert against.sentence().startswith("Don't disaggregate: 2 replicas that do both serve ")
    assert f"{against.together_per_s:.2f} requests/s" in against.sentence()
    with pytest.raises(ValueError, match="count = 1"):
        advise(replica, 1, [(32, 400)], Slo())


# (arrival, prompt, answer tokens) and what the simulator published with the paper says of them:
# seconds to the first token and to the end, phases apart and together. OPT-13B on one A100-80G
# each; their 2 ms and 0.0001 ms a token of each pass and 1 ms of each prompt are counted in.
SCHEDULE = [
    (0.02, 1379, 88), (0.08, 367, 136), (0.32, 385, 197), (0.68, 275, 163), (0.74, 434, 86),
    (0.78, 763, 49), (0.86, 1258, 63), (0.87, 882, 129), (1.04, 667, 164), (1.05, 552, 13),
    (1.13, 1240, 172), (1.68, 907, 14),
]  # fmt: skip
APART = [
    (0.1753, 2.4736), (0.1748, 3.7303), (0.0614, 5.1387), (0.0497, 4.2974), (0.0667, 2.411),
    (0.1298, 1.4924), (0.306, 2.0597), (0.296, 3.7174), (0.4143, 4.655), (0.4043, 0.7901),
    (0.3243, 4.749), (0.1195, 0.5359),
]  # fmt: skip
TOGETHER = [
    (0.1753, 3.5773), (0.1748, 4.7414), (0.0661, 6.0369), (0.0628, 5.1965), (0.0696, 3.2174),
    (0.1326, 2.1888), (0.3089, 2.4965), (0.2989, 4.1773), (0.4171, 4.8606), (0.4071, 0.8994),
    (0.3271, 4.9582), (0.1237, 0.5281),
]  # fmt: skip


def test_schedules_end_when_the_published_simulator_says():
    """It counts the prompt's own token as none of the answer's, so answers are one token longer."""
    times = Coefficients(
        (21.10254647, 0.1020122573, 7.12226431e-6),
        (21.93470262, 7.26935652e-4, 0.03850697741),
        (9.16618895, 6.7980004e-4, 0.15831096192),
        95,
    )
    replica = Replica(times, 66_144, batch_tokens=10**7)
    arrivals = [Arrival(at, prompt, answer + 1) for at, prompt, answer in SCHEDULE]
    for served, wanted in (
        (disaggregated(arrivals, [replica], [replica]), APART),
        (colocated(arrivals, [replica]), TOGETHER),
    ):
        found = [
            (s.ttft_s, s.ttft_s + s.tpot_s * (a.output_tokens - 1))
            for s, a in zip(served, arrivals, strict=True)
        ]
        assert np.array(found) == pytest.approx(np.array(wanted), abs=3e-4)
