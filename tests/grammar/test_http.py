"""Structured output over HTTP: a service of two replicas in this process, the real edge."""

import json
import random
from typing import Any

import httpx
import jsonschema
import pytest

from serve.http import EdgeSettings, build_app
from serve.local import LocalService
from tests.serving.tiny import random_model, run, settings

SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "n": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["ok", "n"],
    "additionalProperties": False,
}
BODY = {"model": "tiny", "prompt": "a long enough prompt", "seed": 5, "max_tokens": 200}


def answers(*bodies: dict[str, Any]) -> list[httpx.Response]:
    """What the service says to each completion request, one after the other."""
    model, responses = random_model(), list[httpx.Response]()

    async def ask() -> None:
        async with LocalService(settings(), model) as service:
            edge = EdgeSettings("tiny", context_tokens=600)
            app = build_app(service.ingress, model.text, edge, chance=random.Random(1))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
                for body in bodies:
                    responses.append(await client.post("/v1/completions", json={**BODY, **body}))

    run(ask())
    return responses


def test_an_answer_over_http_has_its_form_streamed_or_whole():
    form = {"structured_outputs": {"json": SCHEMA}}
    whole, streamed, choice = answers(
        form, {**form, "stream": True}, {"structured_outputs": {"choice": ["a.b", "c|d"]}}
    )
    text = whole.json()["choices"][0]["text"]
    jsonschema.validate(json.loads(text), SCHEMA)
    assert whole.json()["choices"][0]["finish_reason"] == "stop"
    events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(c["text"] for e in events for c in json.loads(e)["choices"]) == text
    assert choice.json()["choices"][0]["text"] in {"a.b", "c|d"}


@pytest.mark.parametrize(
    "body, param",
    [
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_cannot_be_held_is_a_400_that_names_the_field(body: dict[str, Any], param: str):
    (refused,) = answers(body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == param and error["message"].endswith(".")
