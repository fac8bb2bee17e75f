"""What the proof over HTTP asks of servers, and what it makes of their figures."""

import json
from pathlib import Path

import pytest

from serve.perplexity import Scored
from tests.edge.fakes import MODEL, ScriptedService, serving, spoken
from tests.peers import kept, sweeps
from tests.peers.load import Endpoint
from tests.peers.measures import Running
from tests.peers.perplexity import read, second_halves
from tests.peers.picture import draw, plain, text
from tests.peers.sweeps import (
    NEW_TOKENS,
    Context,
    Point,
    Taken,
    point,
    take_contexts,
    take_seen,
    take_streams,
)
from tests.prove.kernel_http import AS_IT_COMES, FIRST_SEEN_S, OURS, PEERS, RATES, verdicts
from tests.prove.row import Row

IGNORE_EOS = {"ignore_eos": True}


@pytest.mark.parametrize(("streams", "answers"), [(1, sweeps.ALONE), (2, 2), (5, 5)])
def test_a_point_is_of_so_many_streams(streams: int, answers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweeps, "PROMPT_TOKENS", 8)
    with serving(ScriptedService(spoken("a" * NEW_TOKENS, finish="length"))) as url:
        made = point(Endpoint(url, MODEL, IGNORE_EOS), "seed", streams)
    assert len(made.first_s) == answers
    assert 0 < made.tokens_per_s <= answers * NEW_TOKENS / max(made.first_s)


def test_servers_take_turns_and_a_failure_takes_all_figures_with_it(
    monkeypatch: pytest.MonkeyPatch,
):
    order: list[str] = []

    def take(endpoint: Endpoint, seed: str, streams: int) -> Point:
        order.append(f"{endpoint.url}{streams}")
        if (endpoint.url, streams) == ("b", 8) and "round 1" in seed:
            raise RuntimeError("first\nb ended")
        return Point(float(len(order)), (0.1,))

    monkeypatch.setattr(sweeps, "point", take)
    monkeypatch.setattr(sweeps, "first_after_seen", lambda endpoint, seed: 0.5)
    monkeypatch.setattr(sweeps, "context", lambda endpoint, seed, tokens: Context(tokens, 1.0))
    peers = Running({name: Endpoint(name, "m") for name in "abc"}, {"d": "not there"})
    taken = Taken(failed=dict(peers.failed))
    take_streams(peers, taken, (1, 8), 3)
    take_seen(peers, taken, 2)
    take_contexts(peers, taken, (64, 128), {"a": "a", "b": "b", "c": "long c"})
    assert "".join(order) == "a1b1c1a8b8c8" + "a1b1c1a8b8c8" + "a1c1a8c8"
    assert taken.failed == {"d": "not there", "b": "RuntimeError: b ended"}
    assert set(taken.streams[1]) == set(taken.streams[8]) == set(taken.seen) == {"a", "c"}
    assert taken.rate(1, "a") == 7.0  # of 1, 7, 13
    assert taken.seen == {"a": [0.5, 0.5], "c": [0.5, 0.5]}
    assert taken.contexts[128] == {"a": [(128, 1.0)], "long c": [(128, 1.0)]}


def test_p90_is_over_the_answers_of_all_rounds():
    taken = Taken(streams={8: {"a": [Point(1, (9.0, 1.0, 2.0, 3.0, 4.0)), Point(1, (5.0,) * 5)]}})
    assert taken.first_p90_s(8, "a") == 5.0
    taken = Taken(streams={1: {"a": [Point(1, (2.0,)), Point(1, (1.0,)), Point(1, (3.0,))]}})
    assert taken.first_p90_s(1, "a") == 3.0


def figures(ours: float, first_s: float = 0.1, seen_s: float = 0.03) -> Taken:
    """Peers make 100, 120 and 110 tokens/s, with first tokens after 0.4, 0.3 and 0.2 s and, after
    a prefix, 0.2, 0.1 and 0.15 s."""
    taken = Taken()
    for streams in RATES:
        points = [Point(100, (0.4,)), Point(120, (0.3,)), Point(110, (0.2,))]
        taken.streams[streams] = {n: [p] for n, p in zip(PEERS, points, strict=True)}
        for name in (OURS, AS_IT_COMES):
            taken.streams[streams][name] = [Point(ours, (first_s,))]
    taken.seen = {name: [s] for name, s in zip(PEERS, (0.2, 0.1, 0.15), strict=True)}
    taken.seen |= {OURS: [seen_s], AS_IT_COMES: [seen_s]}
    return taken


def found(taken: Taken) -> list[Row]:
    return list(verdicts(taken))


def test_every_target_can_be_met_and_missed():
    assert [row.ok for row in found(figures(240))] == [True] * 8
    slow = found(figures(239))
    assert [row.ok for row in slow] == [True, True, False, True, True, True, True, True]
    assert slow[2].measured == "1.99x: 239 tokens/s (as it comes 239); llama.cpp-Q4_0 120"
    assert [row.ok for row in found(figures(143))][1:4] == [False] * 3
    late = found(figures(240, first_s=0.2))  # as late as the best, vLLM
    assert all(row.ok for row in late)
    late = found(figures(240, first_s=0.201))
    assert [row.ok for row in late[4:7]] == [False] * 3
    assert late[4].measured == "201 ms (as it comes 201); vLLM 200"
    assert found(figures(240, seen_s=0.05))[7].ok  # half of the best's
    assert not found(figures(240, seen_s=0.051))[7].ok
    soon = figures(240, seen_s=FIRST_SEEN_S)
    soon.seen["vLLM"] = [0.001]
    assert found(soon)[7].ok


@pytest.mark.parametrize("server", [OURS, *PEERS])
def test_what_is_not_there_is_missed(server: str):
    taken = figures(1000)
    taken.fail(server, "it ended")
    rows = found(taken)
    assert not any(row.ok for row in rows)
    assert f"{server} failed (it ended)" in rows[0].measured
    assert rows[1].measured == f"no figures of {server}"


def test_figures_are_told_as_text_json_and_picture(tmp_path: Path):
    taken = figures(240.5)
    taken.contexts = {128: {OURS: [Context(999.0, 77.5)]}, 512: {OURS: [Context(888.0, 66.5)]}}
    taken.failed["x"] = "gone"
    lines = text(taken).splitlines()
    assert f"1 {OURS} 240.5 100" in [" ".join(line.split()) for line in lines]
    assert f"128 {OURS} 77.5 prefill 999 tokens/s" in [" ".join(line.split()) for line in lines]
    assert lines[-1] == "x: gone"
    told = json.loads(json.dumps(plain(taken)))
    assert told["streams"]["8"]["vLLM"] == [{"tokens_per_s": 110, "first_s": [0.2]}]
    draw(taken, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[1:4] == b"PNG"


def kept_sweep(file: Path, late_after: int, asked: list[str], monkeypatch) -> Taken:
    """One run: as many questions as `late_after` allows."""
    monkeypatch.setattr(
        sweeps, "point", lambda endpoint, seed, streams: note(asked, endpoint, seed)
    )
    monkeypatch.setattr(sweeps, "context", lambda endpoint, seed, tokens: Context(tokens, 2.0))
    monkeypatch.setattr(sweeps, "first_after_seen", lambda endpoint, seed: 0.5)
    taken = kept.load(file)
    keeper = kept.Kept(taken, file, 1e9)
    count = len(asked)
    monkeypatch.setattr(keeper, "late", lambda: len(asked) - count >= late_after)
    peers = Running({name: Endpoint(name, "m") for name in "ab"}, {})
    take_streams(peers, taken, (1, 8), 2, keeper)
    take_seen(peers, taken, 1, keeper)
    take_contexts(peers, taken, (64,), {"a": "a", "b": "b"}, keeper)
    return taken


def note(asked: list[str], endpoint: Endpoint, seed: str) -> Point:
    if "8 streams, round 1" in seed and endpoint.url == "b":
        raise RuntimeError("b ended")
    asked.append(f"{endpoint.url} {seed}")
    return Point(float(len(asked)), (0.1, 0.2))


def test_a_sweep_in_pieces_asks_everything_once(tmp_path: Path, monkeypatch):
    whole: list[str] = []
    wanted = kept_sweep(tmp_path / "whole.json", 99, whole, monkeypatch)
    pieces: list[str] = []
    left = []
    for _ in range(4):
        taken = kept_sweep(tmp_path / "pieces.json", 2, pieces, monkeypatch)
        left.append(taken.left)
    assert pieces == whole and len(set(pieces)) == len(pieces) == 7
    assert left[0] > left[1] > left[2] and left[-1] == 0
    assert taken.streams == wanted.streams and taken.contexts == wanted.contexts
    assert taken.failed == wanted.failed == {"b": "RuntimeError: b ended"}
    assert taken.seen == {"a": [0.5]}


def test_figures_of_other_programs_are_refused(tmp_path: Path, monkeypatch):
    kept_sweep(tmp_path / "cells.json", 99, [], monkeypatch)
    monkeypatch.setattr(kept, "made_of", lambda: "others")
    with pytest.raises(RuntimeError, match="cells.json is of other programs.*delete it"):
        kept.load(tmp_path / "cells.json")


def test_the_programs_figure_and_its_half_of_the_tokens_are_read():
    said = "[1]15.2,[2]14.0,\nFinal estimate: PPL = 14.0312 +/- 0.51\n"
    assert read(said) == 14.0312
    with pytest.raises(RuntimeError, match="no figure: broken"):
        read("broken")
    every = Scored(tuple(float(n) for n in range(14)), tuple(range(14)))
    half = second_halves(every, 2, 8)  # tokens 5 to 7 of windows of 8
    assert half.likeliest == (4, 5, 6, 11, 12, 13)
