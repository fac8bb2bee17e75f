"""Stop strings: the same text and match however the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.stops import StopMatcher

letters = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4).map(tuple)


def oracle(text: str, strings: tuple[str, ...]) -> tuple[str, str | None]:
    """Read one character at a time; the longest stop string that just became complete wins."""
    for end in range(1, len(text) + 1):
        complete = [s for s in strings if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces: list[str], strings: tuple[str, ...]) -> tuple[str, str | None]:
    matcher = StopMatcher(strings)
    out = ""
    for piece in pieces:
        step = matcher.push(piece)
        out += step.text
        if step.matched is not None:
            return out, step.matched
    return out + matcher.flush().text, None


@given(st.lists(letters, max_size=8), stops)
def test_text_and_match_do_not_depend_on_the_pieces(pieces, strings):
    assert run(pieces, strings) == oracle("".join(pieces), strings)


@given(letters, stops)
def test_what_is_let_out_is_never_part_of_a_match(text, strings):
    matcher, out = StopMatcher(strings), ""
    for character in text:
        step = matcher.push(character)
        out += step.text
        if step.matched is not None:
            break
        # Nothing is held back without need: the tail kept could still become a stop string.
        held = text[len(out) : len(out) + len(matcher._held)]
        assert not held or any(s.startswith(held) for s in strings)
    assert oracle(text, strings)[0].startswith(out)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="at least one character"):
        StopMatcher(("a", ""))


def test_without_stop_strings_text_passes_at_once():
    assert StopMatcher().push("anything") == ("anything", None)
