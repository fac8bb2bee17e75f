"""The bench: arrivals, traces, goodput by hand, and a server of known delays as its oracle."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serve.arrivals import Arrival
from serve.bench import Load, Slo, Timing, report, run, run_arrivals
from serve.plot import draw

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
    timings = [Timing(0.1, (0.1,), 0.2, 2, 0), Timing(0.3, (0.1,), 0.4, 2, 0)]
    made = report(timings, 1.0, Slo(0.2, 1))
    draw(made, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
