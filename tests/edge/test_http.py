"""Routes over a real server: answers, and every refusal in the one error shape."""

import json

import httpx
import pytest

from serve.errors import RequestError
from tests.edge.fakes import CONTEXT_TOKENS, MODEL, ScriptedService, serving, spoken

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "hi"}


@pytest.fixture
def service():
    return ScriptedService(spoken("Paris 🙂.", cached_tokens=4))


@pytest.fixture
def client(service):
    with (
        serving(service, max_body_bytes=2048, probe_deadline_s=5.0) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def test_chat(client, service):
    response = client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert response.headers["x-request-id"] == body["id"] == service.requests[0].request_id
    [choice] = body["choices"]
    message = {"role": "assistant", "content": "Paris 🙂.", "refusal": None}
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    prompt = len(service.requests[0].prompt)
    completion = len("Paris 🙂.".encode()) + 1
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert service.closed.wait(5)


def test_chat_stream(client):
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *texts, done = events(client.post("/v1/chat/completions", json=asked))
    assert done == "[DONE]"
    first, *chunks, usage = map(json.loads, texts)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Paris 🙂."
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert len({chunk["id"] for chunk in (first, *chunks, usage)}) == 1
    assert {c["object"] for c in (first, *chunks, usage)} == {"chat.completion.chunk"}


def test_completion_whole_and_streamed(client, service):
    body = client.post("/v1/completions", json=COMPLETION).json()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "Paris 🙂."
    assert service.requests[0].limits.max_tokens == 16
    *texts, done = events(client.post("/v1/completions", json={**COMPLETION, "stream": True}))
    chunks = [json.loads(text) for text in texts]
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Paris 🙂."
    assert all("usage" not in chunk for chunk in chunks)


def test_terms_reach_the_service(client, service):
    terms = {
        **{"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": -3, "stop": "a"},
        **{"stop_token_ids": [9], "max_completion_tokens": 20, "min_tokens": 2, "ignore_eos": True},
    }
    assert client.post("/v1/chat/completions", json={**CHAT, **terms}).status_code == 200
    request = service.requests[0]
    sampling, limits = request.sampling, request.limits
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 7)
    assert (sampling.min_p, sampling.seed) == (0.1, -3)
    assert (limits.max_tokens, limits.min_tokens, limits.stop) == (20, 2, ("a",))
    assert (limits.stop_token_ids, limits.ignore_eos) == ((9,), True)


def test_defaults(client, service):
    client.post("/v1/chat/completions", json=CHAT)
    client.post("/v1/chat/completions", json=CHAT)
    first, second = service.requests
    assert first.limits.max_tokens == CONTEXT_TOKENS - len(first.prompt)
    assert first.sampling.temperature == 1.0
    assert first.sampling.seed != second.sampling.seed
    assert first.request_id != second.request_id


def refused(response: httpx.Response, status: int, code: str | None) -> dict[str, str]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, str] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"].endswith(".")
    return error


def test_unknown_model(client, service):
    for path, body in (("chat/completions", CHAT), ("completions", COMPLETION)):
        error = refused(
            client.post(f"/v1/{path}", json={**body, "model": "gpt-9"}), 404, "model_not_found"
        )
        assert error["param"] == "model"
        assert MODEL in error["message"]
    refused(client.get("/v1/models/gpt-9"), 404, "model_not_found")
    assert service.requests == []


def test_a_prompt_beyond_the_context(client, service):
    long = {**COMPLETION, "prompt": "z" * CONTEXT_TOKENS}
    error = refused(client.post("/v1/completions", json=long), 400, "context_length_exceeded")
    assert error["message"].count(str(CONTEXT_TOKENS)) == 2
    fitting = {**COMPLETION, "prompt": "z" * (CONTEXT_TOKENS - 1)}
    assert client.post("/v1/completions", json=fitting).status_code == 200
    assert service.requests[-1].limits.max_tokens == 1
    asked = {**fitting, "max_tokens": 2}
    error = refused(client.post("/v1/completions", json=asked), 400, "context_length_exceeded")
    assert str(CONTEXT_TOKENS + 1) in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**COMPLETION, "prompt": ""}, "prompt"),
        ({**COMPLETION, "prompt": []}, "prompt"),
        ({**COMPLETION, "prompt": [1, 9999]}, "prompt[1]"),
        ({**COMPLETION, "prompt": [-1]}, "prompt[0]"),
        ({**COMPLETION, "stop_token_ids": [9999]}, "stop_token_ids[0]"),
        ({**COMPLETION, "max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ],
)
def test_refusals_that_need_the_model(client, service, body, param):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert service.requests == []


def test_malformed_bodies(client):
    refused(client.post("/v1/chat/completions", content=b"{"), 400, "invalid_json")
    refused(client.post("/v1/chat/completions", content=b""), 400, "invalid_json")
    refused(client.post("/v1/chat/completions", json=[1]), 400, "invalid_type")
    refused(client.post("/v1/chat/completions", json={}), 400, "missing_parameter")
    unknown = {**CHAT, "streem": True}
    refused(client.post("/v1/chat/completions", json=unknown), 400, "unknown_parameter")


def test_paths_and_methods(client):
    refused(client.get("/v1/nothing"), 404, "unknown_url")
    refused(client.get("/page"), 404, "unknown_url")
    refused(client.post("/v1/chat/completions/", json=CHAT), 404, "unknown_url")
    response = client.get("/v1/chat/completions")
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    refused(client.delete("/v1/models"), 405, "method_not_allowed")


def test_bodies_above_the_limit(client):
    large = json.dumps({**COMPLETION, "prompt": "z" * 3000}).encode()
    refused(client.post("/v1/completions", content=large), 413, "body_too_large")
    chunked = client.post("/v1/completions", content=iter([large[:1500], large[1500:]]))
    refused(chunked, 413, "body_too_large")
    assert client.post("/v1/completions", json=COMPLETION).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_service_is_a_status(client, service, stream):
    text = "All replicas are busy."
    service.script = [RequestError(429, "rate_limit_error", None, text, "overloaded", 1.2)]
    response = client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    error = refused(response, 429, "overloaded")
    assert (error["message"], response.headers["retry-after"]) == (text, "2")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_midway(client, service, stream):
    service.script = [*spoken("Paris")[:-1], RuntimeError("boom")]
    response = client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    if not stream:
        refused(response, 500, "generation_failed")
        return
    assert response.status_code == 200
    *chunks, last = events(response)
    assert json.loads(last)["error"]["code"] == "generation_failed"
    texts = [json.loads(c)["choices"][0]["delta"]["content"] for c in chunks]
    assert "".join(texts) == "Paris"


def test_a_bug_is_an_error_object(client, service, monkeypatch):
    monkeypatch.setattr(service, "generate", lambda request: 1 / 0)
    refused(client.post("/v1/chat/completions", json=CHAT), 500, "internal_error")


def test_models(client):
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == (MODEL, "model", "sanderling")
    assert model["max_model_len"] == CONTEXT_TOKENS
    assert client.get(f"/v1/models/{MODEL}").json() == model


def test_clients_are_told_what_lossy_settings_cost(client):
    [model] = client.get("/v1/models").json()["data"]
    assert model["quality_cost"] == ""
    with serving(ScriptedService(spoken("a")), quality_cost="a little") as url:
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["quality_cost"] == "a little"


def test_health_ready_and_status(client, service):
    assert client.get("/health").status_code == 200
    assert client.get("/ready").json() == {"ready": True}
    assert client.get("/status").json() == {"replicas": [], "metrics": {}}
    service.ready = False
    assert client.get("/ready").status_code == 503
    service.ready = RuntimeError("no replica")
    assert client.get("/ready").status_code == 503
    refused(client.get("/status"), 503, "status_unavailable")
    assert client.get("/health").status_code == 200


def test_a_context_setting_below_the_models_own():
    service = ScriptedService(spoken("a"))
    with serving(service, context_tokens=50) as url:
        body = {**COMPLETION, "prompt": "z" * 50}
        refused(httpx.post(f"{url}/v1/completions", json=body), 400, "context_length_exceeded")
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] == 50


def test_a_long_body_is_encoded_in_a_thread_and_answered_alike():
    service = ScriptedService(spoken("a"))
    with serving(service) as url:
        body = {**COMPLETION, "prompt": "z" * 40_000}
        error = refused(
            httpx.post(f"{url}/v1/completions", json=body), 400, "context_length_exceeded"
        )
        assert "40000" in error["message"]
