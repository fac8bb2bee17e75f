"""How a sequence ends, and that it goes on elsewhere from any point with the same tokens."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.sequence import Limits, Request, Sampling, Sequence
from serve.kv.prefix import CacheKey
from tests.engine.fakes import (
    EOS,
    VOCAB,
    engine,
    free,
    letter,
    run,
    sequence,
    solo,
    solo_tokens,
)

LONG = solo_tokens(sequence("long", [1, 2, 3], 30, ignore_eos=True).request)
TEXT = "".join(letter(token) for token in LONG)
SEEDED = Sampling(temperature=1.0, top_k=10, top_p=0.9, min_p=0.01, seed=7)


def outcome(one):
    made = engine()
    made.add(one)
    collected = run(made)
    assert free(made) and not made._stops
    return collected.tokens[one.request_id], collected.last[one.request_id]


def prompt_whose_tokens_end(max_tokens=12, **limits):
    """The first prompt whose free run meets the end token with at least 3 tokens before it."""
    for first in range(1000):
        one = sequence("ends", [first % VOCAB, first // VOCAB], max_tokens, **limits)
        tokens = solo_tokens(sequence("ends", one.request.prompt, max_tokens, **limits).request)
        if EOS in tokens[3:]:
            return one.request.prompt
    raise AssertionError("no prompt of a thousand ends")


def test_max_tokens():
    tokens, last = outcome(sequence("a", [1, 2, 3], 9, ignore_eos=True))
    assert tokens == LONG[:9] and last.finish == "length"


def test_the_end_token_ends_and_is_delivered():
    prompt = prompt_whose_tokens_end()
    tokens, last = outcome(sequence("a", prompt, 12))
    assert tokens[-1] == EOS and EOS not in tokens[:-1]
    assert (last.finish, last.stop) == ("stop", None)


def test_ignore_eos_goes_on():
    prompt = prompt_whose_tokens_end(ignore_eos=True)
    tokens, last = outcome(sequence("a", prompt, 12, ignore_eos=True))
    assert len(tokens) == 12 and EOS in tokens[:-1] and last.finish == "length"


def test_stop_token_ids_end():
    where = LONG.index(LONG[5])
    tokens, last = outcome(sequence("a", [1, 2, 3], 30, ignore_eos=True, stop_token_ids=(LONG[5],)))
    assert tokens == LONG[: where + 1] and last.finish == "stop" and last.stop is None


def test_before_min_tokens_no_end_token_is_sampled():
    prompt = prompt_whose_tokens_end()
    early = len(outcome(sequence("a", prompt, 12))[0])
    tokens, _ = outcome(sequence("a", prompt, 12, min_tokens=early + 2))
    assert len(tokens) >= early + 2 and EOS not in tokens[: early + 1]


def test_stop_ids_beyond_the_vocabulary_do_no_harm():
    """Foreign input: an index outside the logits must not end the engine's thread."""
    ids = (VOCAB, 10**9, LONG[0])
    tokens, _ = outcome(
        sequence("a", [1, 2, 3], 6, min_tokens=2, stop_token_ids=ids, ignore_eos=True)
    )
    assert LONG[0] not in tokens[:2]


@pytest.mark.parametrize("start,stop", [(4, 5), (4, 7), (0, 2)])
def test_a_stop_string_ends_whatever_tokens_it_spans(start, stop):
    string = TEXT[start:stop]
    tokens, last = outcome(sequence("a", [1, 2, 3], 30, ignore_eos=True, stop=("##", string)))
    assert tokens == LONG[: TEXT.index(string) + len(string)]
    assert (last.finish, last.stop) == ("stop", string)


def test_a_stop_string_counts_only_from_min_tokens_on():
    one = sequence("a", [1, 2, 3], 12, ignore_eos=True, min_tokens=6, stop=(TEXT[2:4],))
    wanted = [delta.token_ids[0] for delta in solo(one.request)]
    assert len(wanted) == 12  # it does not come up again
    assert outcome(one)[0] == wanted


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), SEEDED])
@pytest.mark.parametrize("stop", [(), (TEXT[9:12],)])
def test_resumed_elsewhere_at_any_point_the_same_tokens_follow(sampling, stop):
    request = sequence("a", [1, 2, 3], 14, sampling=sampling, stop=stop, min_tokens=3).request
    wanted = solo_tokens(request)
    for produced in range(len(wanted)):
        payload = Sequence(request, wanted[:produced], cached_tokens=3).to_bytes()
        resumed = Sequence.from_bytes(payload)
        made = engine()
        made.add(resumed)
        outputs = []
        while made.has_work:
            outputs += made.step()
            made.check()
        assert [o.index for o in outputs] == list(range(produced, len(wanted)))
        assert resumed.output == wanted
        assert outputs[-1].delta.finish == solo(request)[-1].finish
        if produced:
            assert {o.delta.cached_tokens for o in outputs} == {3}, "it changed under way"


ids = st.integers(0, 2**31)
requests = st.builds(
    Request,
    request_id=st.text(),
    prompt=st.lists(ids, min_size=1).map(tuple),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 2),
        top_k=st.integers(0, 100),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
        seed=st.integers(-(2**63), 2**64 - 1),
    ),
    limits=st.builds(
        Limits,
        max_tokens=st.integers(1, 10**6),
        min_tokens=st.integers(0, 10),
        stop_token_ids=st.lists(ids).map(tuple),
        stop=st.lists(st.text(min_size=1)).map(tuple),
        ignore_eos=st.booleans(),
    ),
    cache_key=st.builds(CacheKey, st.text(), st.text(), st.text()),
    priority=st.integers(-5, 5),
    arrival_s=st.floats(0, 1e9),
)


@given(requests, st.lists(ids), st.integers(0, 10**6))
def test_a_sequence_survives_the_wire(request, output, cached):
    back = Sequence.from_bytes(Sequence(request, output, cached_tokens=cached).to_bytes())
    assert (back.request, back.output, back.cached_tokens) == (request, output, cached)
    assert isinstance(back.request.cache_key, CacheKey)
    assert back.table is None and back.computed_tokens == 0


def body():
    return json.loads(sequence("a", [1, 2], 3, stop=("x",)).to_bytes())


def changed(path, value):
    whole = body()
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(whole).encode()


MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "no request": json.dumps({**body(), "request": None}).encode(),
    "another format": changed(["format"], 1),
    "an unknown field": changed(["more"], 1),
    "an unknown term": changed(["request", "sampling", "heat"], 1),
    "text for tokens": changed(["request", "prompt"], "12"),
    "a token as text": changed(["request", "prompt"], ["1"]),
    "half a token": changed(["output"], [1.5]),
    "an infinite token": changed(["output"], [float("inf")]),
    "a true token": changed(["output"], [True]),
    "a short key": changed(["request", "cache_key"], ["", ""]),
    "a hot text": changed(["request", "sampling", "temperature"], "1"),
    "no limit": changed(["request", "limits", "max_tokens"], None),
    "one stop": changed(["request", "limits", "stop"], "x"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bytes_are_refused(data):
    with pytest.raises(ValueError):
        Sequence.from_bytes(data)


def test_the_unchanged_body_is_accepted():
    assert Sequence.from_bytes(json.dumps(body()).encode()).request.prompt == (1, 2)


@given(st.data())
def test_bytes_cut_or_spoilt_anywhere_are_refused_or_read(data):
    """Never anything but a sequence or a ValueError."""
    whole = bytearray(sequence("a", [1, 2], 3).to_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    spoilt = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(ValueError):
        assert isinstance(Sequence.from_bytes(spoilt), Sequence)
