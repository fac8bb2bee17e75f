"""The load of the peers table against the HTTP edge over scripted tokens, against servers that
break off, and what the table makes of its numbers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serve.bench import Slo
from tests.edge.fakes import MODEL, ScriptedService, Step, serving, spoken, tiny_tokenizer
from tests.peers.load import (
    Answer,
    Endpoint,
    LoadError,
    Question,
    ask,
    goodput_per_s,
    tokens_per_s,
    words,
)
from tests.peers.measures import Measure, Result, Running, compare
from tests.prove.peers import row

WAIT_S, GAP_S = 0.2, 0.1
ANSWER = spoken("abcd", finish="length")
# The first token after WAIT_S, the others GAP_S apart.
SLOW = [WAIT_S, ANSWER[0], *(step for delta in ANSWER[1:] for step in (GAP_S, delta))]
IGNORE_EOS = {"ignore_eos": True}


def test_tokens_and_times_are_those_of_the_script():
    prompt = words(8, "a")
    with serving(ScriptedService(SLOW)) as url:
        endpoint = Endpoint(url, MODEL, IGNORE_EOS)
        together = ask(endpoint, [Question(prompt, 4), Question(prompt, 4, at_s=0.3)])
        speed = tokens_per_s(endpoint, [Question(prompt, 4)] * 5)
    for answer in together:
        assert answer.completion_tokens == 4
        assert answer.prompt_tokens == len(tiny_tokenizer().encode(prompt))
        # From when each was due, not from when the first was sent.
        assert WAIT_S <= answer.first_s < answer.first_s + 2.9 * GAP_S <= answer.last_s
    assert 0 < speed <= 20 / (WAIT_S + 3 * GAP_S)


def test_a_promise_is_kept_by_both_times():
    answer = Answer(first_s=1.0, last_s=1.6, prompt_tokens=4, completion_tokens=4)
    assert answer.within(Slo(1.0, 0.21))
    assert not answer.within(Slo(0.9, 0.21))
    assert not answer.within(Slo(1.0, 0.19))
    assert Answer(1.0, 1.0, 4, 1).within(Slo(1.0, 0.0))


def test_goodput_counts_only_kept_promises():
    with serving(ScriptedService(SLOW)) as url:
        endpoint = Endpoint(url, MODEL, IGNORE_EOS)
        questions = [Question(words(4, str(n)), 4) for n in range(3)]
        assert goodput_per_s(endpoint, questions, Slo(WAIT_S / 2, 10.0)) == 0
        assert goodput_per_s(endpoint, questions, Slo(60.0, GAP_S / 2)) == 0
        assert goodput_per_s(endpoint, questions, Slo(60.0, 60.0)) > 0


FAILURES: dict[str, tuple[list[Step], str, int]] = {
    "an error within the stream": ([*ANSWER[:2], RuntimeError("broken")], MODEL, 4),
    "fewer tokens than asked for": ([*spoken("abcd")], MODEL, 8),
    "another model's name": ([*ANSWER], "nobody", 4),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_is_no_whole_answer_is_an_error(name: str):
    script, model, max_tokens = FAILURES[name]
    with serving(ScriptedService(script)) as url, pytest.raises(LoadError):
        ask(Endpoint(url, model, IGNORE_EOS), [Question("word", max_tokens)])


class Cut(BaseHTTPRequestHandler):
    """Two tokens of an answer, and the end of the connection."""

    chunked = False

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(2):
            event = f"data: {json.dumps({'choices': [{'text': 'a'}]})}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event) if self.chunked else event)

    def log_message(self, *_: object) -> None:
        pass


class CutChunked(Cut):
    """The same where HTTP itself says that the end is missing."""

    protocol_version = "HTTP/1.1"
    chunked = True

    def do_POST(self) -> None:
        super().do_POST()
        self.close_connection = True


@pytest.fixture(params=[Cut, CutChunked])
def cutting(request: pytest.FixtureRequest) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cut_stream_is_an_error(cutting: str):
    with pytest.raises(LoadError, match="its stream"):
        ask(Endpoint(cutting, "m"), [Question("word", 4)])


def test_rounds_go_in_turns_and_a_failure_is_told():
    order: list[str] = []
    numbers = iter([1.0, 2.0, 4.0, 3.0, 2.0, 5.0])

    def take(endpoint: Endpoint, seed: str) -> float:
        order.append(endpoint.url)
        if endpoint.url == "c":
            raise LoadError("c ended.")
        return next(numbers)

    running = Running({name: Endpoint(name, "m") for name in "abc"}, {"d": "not there"})
    result = compare(running, Measure("load", "s", False, 3, take))
    assert order == ["a", "b", "c", "a", "b", "a", "b"]
    assert result.values == {"a": [1.0, 4.0, 2.0], "b": [2.0, 3.0, 5.0]}
    told = row(result)
    assert not told.ok
    assert told.measured.startswith("a 2, b 3 (1.50x), ")  # a takes two thirds of b's time
    assert "d failed (not there)" in told.measured and "c failed (LoadError" in told.measured


def test_speed_is_above_one_for_who_is_ahead():
    result = Result(Measure("load", "tokens/s", True, 1, lambda *_: 0.0), {"a": [2.0], "b": [8.0]})
    assert result.speed("a", "b") == 0.25
    result = Result(result.measure, {"a": [2.0], "b": [0.0]})
    assert result.speed("a", "b") == float("inf")
    assert row(result).ok
