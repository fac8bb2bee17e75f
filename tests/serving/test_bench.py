"""The bench: arrivals, traces, goodput by hand, and a server of known delays as its oracle."""

import json
import random
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.cpu import bench as kernel_bench
from kernels.cpu.ops import Packed
from serve.arrivals import Arrival, poisson, trace
from serve.bench import Load, Slo, Timing, quantiles, report, run, run_arrivals
from serve.plot import draw, draw_kernels

DATA = Path(__file__).parents[3] / "shared" / "data"
FIRST_S, GAP_S = 0.2, 0.05


class Slow(BaseHTTPRequestHandler):
    """Streams three tokens: the first after FIRST_S, the others GAP_S apart."""

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for wait_s in (FIRST_S, GAP_S, GAP_S):
            time.sleep(wait_s)
            self._event({"choices": [{"delta": {"content": "a"}}]})
        usage = {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: object) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_closed_loop_measures_what_the_server_does(slow):
    made = run(slow, Load(6, 3, 8, 3), slo=Slo(FIRST_S * 5, GAP_S / 5))
    assert made["time_to_first_token_s"]["p50"] >= FIRST_S
    assert made["inter_token_latency_s"]["p50"] == pytest.approx(GAP_S, rel=0.6)
    assert made["e2e_latency_s"]["p50"] >= FIRST_S + 2 * GAP_S
    assert made["cached_tokens"] == 12
    assert made["output_tokens_per_s"] == pytest.approx(18 / made["wall_s"])
    assert made["within_slo"] == 0.0  # the gaps are five times what was promised


def test_arrivals_count_from_when_they_were_due(slow):
    late = [Arrival(0.0, 8, 3)] * 3 + [Arrival(0.4, 8, 3)]
    made = run_arrivals(slow, late)
    assert made["wall_s"] >= 0.4 + FIRST_S
    assert made["load"]["offered_per_s"] == pytest.approx(10)
    assert all(first >= FIRST_S for first, _, _ in made["requests"])


def test_goodput_by_hand():
    timings = [
        Timing(0.1, (0.1, 0.3), 0.5, 3, 0),  # mean gap 0.2
        Timing(0.1, (0.1, 0.1), 0.3, 3, 0),
        Timing(0.9, (0.1,), 1.0, 2, 0),
        Timing(0.2, (), 0.2, 1, 0),
    ]
    made = report(timings, 2.0, Slo(0.5, 0.15))
    assert (made["within_slo"], made["goodput_per_s"]) == (0.5, 1.0)
    assert (made["requests_per_s"], made["output_tokens_per_s"]) == (2.0, 4.5)


def test_quantiles_are_numpys():
    values = [random.Random(n).expovariate(1) for n in range(57)]
    wanted = dict(zip(("p50", "p90", "p99"), np.percentile(values, [50, 90, 99]), strict=True))
    assert quantiles(values) == pytest.approx(wanted)


def test_poisson_gaps_are_exponential_and_seeded():
    made = poisson(20_000, 4.0, 10, 5, seed=3)
    assert made == poisson(20_000, 4.0, 10, 5, seed=3) != poisson(20_000, 4.0, 10, 5, seed=4)
    gaps = [b.at_s - a.at_s for a, b in zip(made, made[1:], strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(np.exp(-1), rel=0.03)


def test_traces_of_both_kinds(tmp_path: Path):
    azure = tmp_path / "a.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.9799600,31,0\n"
    )
    first, second = trace(azure, 9, speed=4)
    assert first == Arrival(0, 4808, 10) and second[1:] == (31, 1)
    assert second.at_s == pytest.approx(0.5)
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text('{"timestamp": 3000, "input_length": 7, "output_length": 2}\n' * 3)
    assert trace(mooncake, 2) == [Arrival(0, 7, 2)] * 2
    for name, text in (("x.txt", ""), ("b.csv", "TIMESTAMP\n"), ("c.jsonl", "{}\n")):
        wrong = tmp_path / name
        wrong.write_text(text)
        with pytest.raises(ValueError, match=name):
            trace(wrong, 3)


@pytest.mark.data
def test_the_real_traces_are_read():
    files = [*DATA.glob("azure-llm/*.csv"), *DATA.glob("mooncake/*.jsonl")]
    if not files:
        pytest.skip("no ../shared/data/azure-llm and mooncake here")
    for file in files:
        made = trace(file, 500)
        assert len(made) > 100 and made[0].at_s == 0
        assert all(a.at_s <= b.at_s for a, b in zip(made, made[1:], strict=False))


def test_the_picture_is_a_png(tmp_path: Path):
    timings = [Timing(0.1, (0.1,), 0.2, 2, 0), Timing(0.3, (0.1,), 0.4, 2, 0)]
    made = report(timings, 1.0, Slo(0.2, 1))
    draw(made, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_kernels_is_a_png(tmp_path: Path):
    limits = kernel_bench.Limits(bytes_per_s=2e10, products_per_s=5e11)
    figures = [
        kernel_bench.Figure(m, activations, 0.01 * m, 0.5, 0.5)
        for m in (1, 32)
        for activations in ("accurate", "fast")
    ]
    matrix = Packed(torch.zeros(320, dtype=torch.uint8), 0, 16, 32)
    draw_kernels(kernel_bench.Report(limits, figures), [matrix], tmp_path / "k.png")
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
