"""/v1/embeddings over a service of known vectors: shapes, order, encodings, refusals."""

import asyncio
import base64
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import numpy as np
import pytest

from serve.engine.sequence import Delta, Request
from serve.http import EdgeSettings, build_app
from tests.edge.fakes import CONTEXT_TOKENS, MODEL, tiny_text_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Vectors:
    """Answers with (first token, number of tokens), the later ones first."""

    def __init__(self, error: str | None = None) -> None:
        self.error = error
        self.open = 0

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        assert request.embed
        self.open += 1
        try:
            await asyncio.sleep(0.02 / len(request.prompt))
            if self.error:
                yield Delta((), "error", error=self.error)
                return
            yield Delta((), "stop", embedding=(float(request.prompt[0]), len(request.prompt) / 2))
        finally:
            self.open -= 1

    async def probe(self) -> bool:
        return True

    async def status(self) -> dict[str, Any]:
        return {}


def post(service: Any = None, **fields: object) -> httpx.Response:
    app = build_app(service or Vectors(), tiny_text_model(), EdgeSettings(MODEL))

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            return await client.post("/v1/embeddings", json={"model": MODEL, **fields})

    return asyncio.run(work())


def test_texts_and_ids_in_order():
    texts = ["hello", "he", "a much longer text"]
    answer = post(input=texts).json()
    ids = [TOKENIZER.encode(text) for text in texts]
    assert [d["embedding"] for d in answer["data"]] == [[float(i[0]), len(i) / 2] for i in ids]
    assert [d["index"] for d in answer["data"]] == [0, 1, 2]
    tokens = sum(map(len, ids))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (answer["object"], answer["model"]) == ("list", MODEL)
    assert post(input=ids).json() == answer
    assert post(input=ids[0]).json()["data"] == post(input="hello").json()["data"]


def test_fewer_dimensions_are_the_first_at_length_one():
    [entry] = post(input="hello", dimensions=1).json()["data"]
    assert entry["embedding"] == [1.0]
    [both] = post(input="hello", dimensions=2).json()["data"]
    [plain] = post(input="hello").json()["data"]
    length = sum(x * x for x in plain["embedding"]) ** 0.5
    assert both["embedding"] == pytest.approx([x / length for x in plain["embedding"]])


def test_base64_is_little_endian_float32():
    [entry] = post(input="hello", encoding_format="base64").json()["data"]
    [plain] = post(input="hello").json()["data"]
    decoded = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").tolist()
    assert decoded == plain["embedding"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": ""}, "input[0]", "at least one token"),
        ({"input": []}, "input", "1 to 2048"),
        ({"input": ["he", 5]}, "input", "string"),
        ({"input": [[70_000]]}, "input[0][0]", "token ids of this model"),
        ({"input": [5] * (CONTEXT_TOKENS + 1)}, "input[0]", "context"),
        ({"input": "he", "dimensions": 9}, "dimensions", "this model"),
        ({"input": "he", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({}, "input", "input"),
    ],
)
def test_refusals_name_the_field(fields, param, words):
    answer = post(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_a_failure_is_a_500_with_its_sentence_and_leaves_nothing_open():
    service = Vectors("The request failed on its replica: it burns.")
    answer = post(service, input=["he", "hello", "llo"])
    assert answer.status_code == 500
    assert answer.json()["error"]["message"].endswith("it burns.")
    assert service.open == 0
