"""/tokenize and /detokenize: the tokenizer's own answers, and refusals."""

import asyncio

import httpx
import pytest

from serve.http import EdgeSettings, build_app
from tests.edge.fakes import CONTEXT_TOKENS, MODEL, ScriptedService, tiny_text_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def post(path: str, **fields: object) -> httpx.Response:
    app = build_app(ScriptedService(), tiny_text_model(), EdgeSettings(MODEL))

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            return await client.post(path, json={"model": MODEL, **fields})

    return asyncio.run(work())


@pytest.mark.parametrize("text", ["", "hello world", "wé🙂\n\n", "<|im_start|>"])
def test_there_and_back(text):
    answer = post("/tokenize", prompt=text, return_token_strs=True).json()
    assert answer["tokens"] == TOKENIZER.encode(text)
    assert answer["token_strs"] == [TOKENIZER.token(token) for token in answer["tokens"]]
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), CONTEXT_TOKENS)
    assert post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}


def test_messages_become_the_prompt_of_a_chat():
    answer = post("/tokenize", messages=[{"role": "user", "content": "he"}]).json()
    wanted = "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(answer["tokens"], skip_special=False) == wanted
    assert answer["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "promt": 1}, "promt"),
        ("/detokenize", {"tokens": [99_999]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_refusals(path, fields, param):
    answer = post(path, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
