"""Answers and chunks against the schemas that OpenAI publishes (a data file; skipped without)."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from serve.answers import (
    CachedTokens,
    ChatFormat,
    Complete,
    CompletionFormat,
    Head,
    Model,
    ModelList,
    Usage,
)
from serve.errors import refuse

jsonschema = pytest.importorskip("jsonschema")  # comes with Ray
SPEC = Path(__file__).parents[3] / "shared" / "data" / "openai" / "openapi-core.json"
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not SPEC.exists(), reason="OpenAI's schema is not beside the repository"),
]
USAGE = Usage(
    prompt_tokens=1,
    completion_tokens=2,
    total_tokens=3,
    prompt_tokens_details=CachedTokens(cached_tokens=0),
)


def json_schema(node: Any) -> Any:
    """OpenAPI 3.0's `nullable`, which the file still uses, in JSON Schema's words."""
    if isinstance(node, list):
        return [json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    rest = {key: json_schema(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [rest, {"type": "null"}]} if node.get("nullable") is True else rest


def check(name: str, value: Any) -> None:
    spec = json_schema(json.loads(SPEC.read_text()))
    schema = {"$ref": f"#/components/schemas/{name}", "components": spec["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def written(*objects: BaseModel | None) -> list[dict[str, Any]]:
    return [json.loads(item.model_dump_json()) for item in objects if item is not None]


def test_chat_answers_and_chunks():
    plain, metered = (ChatFormat(Head("id", 5, "m", asked)) for asked in (False, True))
    check("CreateChatCompletionResponse", plain.answer([Complete("a", "stop")], USAGE).model_dump())
    for form in (plain, metered):
        for chunk in written(form.opening(), form.chunk("a", None), form.chunk("", "length")):
            check("CreateChatCompletionStreamResponse", chunk)
    [last] = written(metered.usage(USAGE))
    check("CreateChatCompletionStreamResponse", last)


def test_completion_answers():
    form = CompletionFormat(Head("id", 5, "m", False))
    check("CreateCompletionResponse", form.answer([Complete("a", "stop")], USAGE).model_dump())


def test_models_and_errors():
    models = ModelList(data=[Model(id="m", created=5, max_model_len=10)])
    check("ListModelsResponse", models.model_dump())
    check("ErrorResponse", refuse("No.", "n").body())


def test_the_check_can_fail():
    with pytest.raises(jsonschema.ValidationError):
        check("ErrorResponse", {"error": {"message": "No."}})
