"""Answers of an engine with random weights have the form that was asked for; jsonschema judges."""

import json
import random
from typing import Any

import jsonschema
import pytest

from cluster.settings import Settings
from serve import build
from serve.engine.engine import Engine
from serve.engine.sequence import Limits, Request, Sampling, Sequence
from serve.grammar.compiler import MAX_DEPTH, MAX_SOURCE_BYTES, Compiler
from serve.grammar.terms import Grammar
from tests.serving.tiny import KEY, random_model

MODEL = random_model()
END = MODEL.text.tokenizer.eos_token_ids[0]
MOST_TOKENS = 400


def engine() -> Engine:
    sizes = {"engine": {"kv_tokens": 1024, "page_tokens": 16, "budget_tokens": 64}}
    return build.engine(Settings.model_validate(sizes), MODEL, None)[0]


def asked(grammar: Grammar, seed: int, max_tokens: int = MOST_TOKENS) -> Request:
    sampling = Sampling(temperature=1.0, seed=seed)
    return Request(f"r{seed}", (1, 2, 3), sampling, Limits(max_tokens), KEY, grammar=grammar)


def run(sequence: Sequence, steps: int | None = None) -> tuple[list[int], str | None]:
    """The output after so many steps, or to its end, and why it ended."""
    running = engine()
    running.add(sequence)
    finish = None
    while finish is None and steps != 0:
        for output in running.step():  # none while a resumed answer is read in chunks
            finish = output.delta.finish
            assert output.delta.error is None, output.delta.error
        steps = None if steps is None else steps - 1
    return sequence.output, finish


def random_schema(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["boolean", "enum", "integer", "string", "null"] + ["array", "object"] * (depth > 0)
    kind = chance.choice(kinds)
    if kind == "enum":
        return {"enum": chance.sample(["red", 'quo"te', 7, None, True, "ü"], 3)}
    if kind == "integer":
        return {"type": kind, "minimum": chance.randint(-50, 0), "maximum": chance.randint(0, 900)}
    if kind == "string":
        return {"type": kind, "maxLength": chance.randint(1, 6)}
    if kind == "array":
        items = random_schema(chance, depth - 1)
        return {"type": kind, "items": items, "minItems": chance.randint(0, 1), "maxItems": 2}
    if kind != "object":
        return {"type": kind}
    fields = {name: random_schema(chance, depth - 1) for name in ("a", "b")}
    required = chance.sample(list(fields), chance.randint(0, 2))
    return {
        "type": kind, "properties": fields, "required": required, "additionalProperties": False
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(200))
def test_an_answer_validates_and_is_the_same_when_resumed(seed: int):
    schema = random_schema(random.Random(seed))
    request = asked(Grammar("json_schema", json.dumps(schema)), seed)
    whole, finish = run(Sequence(request))
    assert finish == "stop" and whole[-1] == END
    jsonschema.validate(json.loads(MODEL.text.tokenizer.decode(whole)), schema)
    part = Sequence(request)
    run(part, steps=len(whole) // 2)
    resumed, _ = run(Sequence.from_bytes(part.to_bytes()))
    assert resumed == whole


def test_without_the_grammar_the_answer_is_something_else():
    request = Request("free", (1, 2, 3), Sampling(seed=1), Limits(40), KEY)
    text = MODEL.text.tokenizer.decode(run(Sequence(request))[0])
    with pytest.raises(ValueError):
        json.loads(text)


def test_regex_and_both_notations_of_ebnf_decide_the_answer():
    for grammar, accepted in [
        (Grammar("regex", "(yes|no)!"), {"yes!", "no!"}),
        (Grammar("ebnf", 'start: "left" | "right"'), {"left", "right"}),
        (Grammar("ebnf", 'root ::= "left" | "right"'), {"left", "right"}),
    ]:
        texts = {MODEL.text.tokenizer.decode(run(Sequence(asked(grammar, s)))[0]) for s in range(8)}
        assert texts <= accepted and texts


def test_the_maximum_ends_it_in_the_middle():
    output, finish = run(Sequence(asked(Grammar("json_object"), 1, max_tokens=1)))
    assert (MODEL.text.tokenizer.decode(output), finish) == ("{", "length")


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(a"),
        Grammar("json_schema", '{"type": "strin"}'),
        Grammar("json_schema", '{"not": {"type": "string"}}'),
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"x-guidance": {}}'),
        Grammar("ebnf", "start: nothing"),
        Grammar("ebnf", "::="),
        Grammar("regex", "(" * (MAX_DEPTH + 1) + "a" + ")" * (MAX_DEPTH + 1)),
        Grammar("regex", "a" * (MAX_SOURCE_BYTES + 1)),
    ],
)
def test_what_cannot_be_compiled_is_a_value_error(grammar: Grammar):
    with pytest.raises(ValueError):
        Compiler(MODEL.text.tokenizer).matcher(grammar)


def test_the_end_is_allowed_exactly_where_the_answer_may_end():
    matcher = Compiler(MODEL.text.tokenizer).matcher(Grammar("regex", "ab?"))
    tokens = MODEL.text.tokenizer.encode("ab")
    assert not matcher.allowed()[END]
    matcher.consume(tokens[0])
    assert set(matcher.allowed().nonzero()[0]) == {tokens[1], END}
    matcher.consume(tokens[1])
    assert set(matcher.allowed().nonzero()[0]) == {END}
    matcher.consume(tokens[1])
    assert matcher.failure is not None and not matcher.allowed().any()
