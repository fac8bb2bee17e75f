"""API keys: who gets in, as whom, and that no key is ever shown."""

import asyncio
import hashlib
import json
import logging
import tomllib
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from cluster.settings import resolve
from cluster.settings.sections import HttpSettings
from serve.errors import RequestError
from serve.http import EdgeSettings, build_app
from serve.key_command import key as key_command
from serve.keys import KeyEntry, KeyRing, digest, load_keys, new_key
from tests.edge.fakes import MODEL, ScriptedService, spoken, tiny_text_model

SECRET = "sk-sanderling-tested"
RING = KeyRing(
    [
        KeyEntry(tenant="a", sha256=digest(SECRET)),
        KeyEntry(tenant="b", sha256=digest("other"), priority=-3, share=2.0),
    ]
)


def ask(
    ring: KeyRing, path: str, body: object = None, authorization: str | None = None
) -> tuple[httpx.Response, ScriptedService]:
    service = ScriptedService(spoken("hi"))
    app = build_app(service, tiny_text_model(), EdgeSettings(MODEL, keys=ring))
    headers = {} if authorization is None else {"Authorization": authorization}

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            if body is None:
                return await client.get(path, headers=headers)
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(work()), service


COMPLETION = {"model": MODEL, "prompt": "he", "max_tokens": 5}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/completions", {"not": "even valid"}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"model": MODEL, "prompt": "he"}),
        ("/detokenize", {"model": MODEL, "tokens": [104]}),
        ("/v1/models", None),
        (f"/v1/models/{MODEL}", None),
    ],
)
@pytest.mark.parametrize("sent", [None, "", "Bearer", "Bearer wrong", "Basic " + SECRET, SECRET])
def test_without_a_known_key_nothing_is_done(path, body, sent):
    answer, service = ask(RING, path, body, sent)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert not service.requests
    assert "wrong" not in answer.text and SECRET not in answer.text


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/status"])
def test_what_watches_the_service_needs_no_key(path):
    assert ask(RING, path)[0].status_code == 200


def test_a_key_says_who_asks():
    answer, service = ask(RING, "/v1/completions", COMPLETION, f"bearer {SECRET}")
    assert answer.status_code == 200
    [request] = service.requests
    assert (request.cache_key.salt, request.priority, request.share) == ("tenant:a", 0, 1.0)
    body = {**COMPLETION, "priority": 1}
    [request] = ask(RING, "/v1/completions", body, "Bearer other")[1].requests
    assert (request.cache_key.salt, request.priority, request.share) == ("tenant:b", -2, 2.0)


def test_a_tenant_cannot_make_itself_more_urgent():
    body = {**COMPLETION, "priority": -1}
    answer, service = ask(RING, "/v1/completions", body, "Bearer other")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "priority"
    assert not service.requests
    [request] = ask(KeyRing(), "/v1/completions", body)[1].requests
    assert request.priority == -1


@pytest.mark.parametrize("field", ["cache_salt", "salt", "tenant", "share", "turn", "group"])
def test_the_body_cannot_say_it(field):
    answer, service = ask(RING, "/v1/completions", {**COMPLETION, field: "b"}, f"Bearer {SECRET}")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_parameter"
    assert not service.requests


def test_a_key_file_made_by_the_command(tmp_path: Path):
    shown = CliRunner().invoke(key_command, ["team-a", "--share", "2"]).output
    made = next(line.strip() for line in shown.splitlines() if "sk-sanderling-" in line)
    table = shown[shown.index("[[key]]") :]
    assert made not in table
    assert tomllib.loads(table)["key"][0]["sha256"] == hashlib.sha256(made.encode()).hexdigest()
    file = tmp_path / "keys.toml"
    file.write_text(table + CliRunner().invoke(key_command, ["team-b"]).output.split("\n\n")[-1])
    ring = load_keys(HttpSettings(api_keys_file=str(file)))
    assert [entry.tenant for entry in ring.entries] == ["team-a", "team-b"]
    caller = KeyRing.from_json(ring.to_json()).caller(f"Bearer {made}")
    assert (caller.salt, caller.share) == ("tenant:team-a", 2.0)
    with pytest.raises(RequestError):
        ring.caller(f"Bearer {new_key()}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "cannot be read"),
        ("", "at least one"),
        ("[[key]]\ntenant='a'\nsha256='12'", "number 1, sha256"),
        ("[[key]]\ntenant='a b'\nsha256='" + "0" * 64 + "'", "number 1, tenant"),
        ("[[key]]\ntenant='a'\nkey='plain'\nsha256='" + "0" * 64 + "'", "number 1, key"),
        ("other = 1", "nothing else"),
    ],
)
def test_a_wrong_key_file_is_refused(tmp_path: Path, text: str, words: str):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_keys(HttpSettings(api_keys_file=str(file)))
    with pytest.raises(ValueError, match=r"cannot be read"):
        load_keys(HttpSettings(api_keys_file=str(tmp_path / "none.toml")))


def test_a_key_from_the_environment_is_kept_as_a_hash_only():
    resolved = resolve(None, {"SANDERLING_HTTP__API_KEY": SECRET}, (), {})
    shown = resolved.to_toml() + resolved.settings.model_dump_json() + repr(resolved.settings)
    assert SECRET not in shown and digest(SECRET) in shown
    again = type(resolved.settings).model_validate_json(resolved.settings.model_dump_json())
    caller = load_keys(again.http).caller(f"Bearer {SECRET}")
    assert caller.salt == "tenant:default"


def test_no_key_is_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    for sent in (f"Bearer {SECRET}", f"Bearer {SECRET}x"):
        answer, _ = ask(RING, "/v1/completions", COMPLETION, sent)
        assert SECRET not in json.dumps(dict(answer.headers)) + answer.text
    assert SECRET not in caplog.text
