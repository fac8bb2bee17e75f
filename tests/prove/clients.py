"""Proof rows of other people's clients: openai 2.x and 3.x, schemathesis over OpenAI's own
description, 64 streams at once, and bodies that are wrong on the wire."""

import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.cluster_ray.machine import free_port
from tests.live.service import MODEL, LiveService, service, wait_for
from tests.prove.attempt import attempt
from tests.prove.environments import environment
from tests.prove.row import Row

ROOT = Path(__file__).parents[2]
SPEC = ROOT.parent / "shared" / "data" / "openai" / "openapi-core.json"
STREAMS = 64
VOCABULARY = 266  # of the scripted edge
TOKEN = {"type": "integer", "minimum": 0, "maximum": VOCABULARY - 1}
TEXT = {"type": "string", "minLength": 1}
BIAS = {"type": "number", "minimum": -100, "maximum": 100}
STOP = {"type": "string", "minLength": 1, "maxLength": 1024}
# base64 is an answer that the description does not know, though OpenAI gives it; an answer of no
# tokens, and a completion or embedding of nothing, are refused with a sentence; the keys of
# logit_bias are token ids, its values any number in OpenAI's bounds; a null is "not given",
# everywhere.
NARROWED = {
    "encoding_format": {"type": "string", "enum": ["float"]},
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "logit_bias": {
        "type": ["object", "null"],
        "patternProperties": {"^(0|[1-9][0-9]?|1[0-9]{2})$": BIAS},
        "additionalProperties": False,
    },
    "stop": {
        "anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": 16}, {"type": "null"}],
    },
    "prompt": TEXT,
    "user": {"type": ["string", "null"]},
    "input": {
        "anyOf": [
            TEXT,
            {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 64},
            {"type": "array", "items": TOKEN, "minItems": 1, "maxItems": 64},
        ]
    },
}
# The description documents only 200 and 429, and no event stream for completions.
EXCLUDED = {
    "--exclude-path": "status_code_conformance",
    "--include-path": "status_code_conformance,content_type_conformance",
}


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured."""
    yield from attempt("schemathesis", schemathesis)
    with service() as live:
        yield from attempt("openai 2.x", lambda: openai_client(live, "openai>=2,<3"))
        yield from attempt("openai 3.x", lambda: openai_client(live, None))
        yield from attempt("64 streams", lambda: streams(live))
        yield from attempt("wrong bodies", lambda: wrong_bodies(live))


@contextmanager
def edge() -> Iterator[str]:
    """The HTTP edge over scripted tokens, in a process of its own."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.clients.server", str(port)], cwd=ROOT)
    url = f"http://127.0.0.1:{port}"

    def up() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_for(up, "the edge", 60)
        yield url
    finally:
        process.kill()
        process.wait()


def schemathesis() -> Iterator[Row]:
    """Phases examples and coverage; the model's name is narrowed to the one that is served, since
    any other is an honest 404."""
    st = environment("schemathesis", "schemathesis==4.32.5") / "st"
    with tempfile.TemporaryDirectory() as folder, edge() as url:
        spec = Path(folder) / "spec.json"
        spec.write_text(json.dumps(narrowed(json.loads(SPEC.read_text()), "tiny")))
        for flag, excluded in EXCLUDED.items():
            command = [
                str(st),
                "run",
                str(spec),
                "--url",
                f"{url}/v1",
                "--phases",
                "examples,coverage",
            ]
            command += ["--exclude-checks", excluded, flag, "/completions", "--no-color"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
            found = re.search(r"(\d+) generated", done.stdout)
            cases = int(found[1]) if found else 0
            what = "/completions" if "include" in flag else "chat, embeddings, models"
            names = re.findall(r"❌ (.*: \d+)$", done.stdout, re.MULTILINE)
            measured = f"{cases} cases, {', '.join(names) or 'no failure'}"
            ok = done.returncode == 0 and cases > 60
            yield Row(f"schemathesis: {what}, without {excluded}", "no failure", measured, ok)


def narrowed(spec: dict[str, Any], model: str) -> dict[str, Any]:
    """The description with `model` of every request fixed to one name, without `suffix`, which is
    refused on purpose, and with NARROWED in place of what it says of these fields."""

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "model" in node.get("properties", {}):
                node["properties"]["model"] = {"type": "string", "enum": [model]}
                node["properties"].pop("suffix", None)
                for field, narrow in NARROWED.items():
                    if field in node["properties"]:
                        node["properties"][field] = narrow
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    for name, schema in spec["components"]["schemas"].items():
        if name.endswith("Request"):
            walk(schema)
    # The first token of a prompt has no log-probability: OpenAI answers null, and does not say so.
    found = spec["components"]["schemas"]["CreateCompletionResponse"]["properties"]["choices"]
    for reported in found["items"]["properties"]["logprobs"]["anyOf"]:
        for field in ("token_logprobs", "top_logprobs"):
            if field in reported.get("properties", {}):
                items = reported["properties"][field]["items"]
                reported["properties"][field]["items"] = {"anyOf": [items, {"type": "null"}]}
    # What depends on another field (stream, n), which the description cannot say.
    for field in ("stream_options", "best_of"):
        del spec["components"]["schemas"]["CreateCompletionRequest"]["properties"][field]
    return spec


def openai_client(live: LiveService, requirement: str | None) -> Row:
    """One script through every endpoint; None is the library of this environment."""
    python = sys.executable
    if requirement is not None:
        python = str(environment("openai-2", requirement) / "python")
    script = ROOT / "tests" / "clients" / "openai_script.py"
    done = subprocess.run(
        [python, str(script), live.url, MODEL], capture_output=True, text=True, timeout=300
    )
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    measured = last[0] if last else "nothing said"
    version = "2" if requirement else "3"
    ok = done.returncode == 0 and measured.startswith(f"openai {version}.")
    return Row(f"openai client {version}.x, every endpoint", "all as expected", measured, ok)


def streams(live: LiveService) -> Row:
    """All streams at once; every one has to end as it should, none refused."""
    ends = asyncio.run(_streams(live))
    complete = sum(end in ("stop", "length") for end in ends)
    text = f"{complete} complete"
    return Row(f"{STREAMS} concurrent streams", f"{STREAMS} complete", text, complete == STREAMS)


async def _streams(live: LiveService) -> list[str]:
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        return await asyncio.gather(*(_stream(client, live, n) for n in range(STREAMS)))


async def _stream(client: httpx.AsyncClient, live: LiveService, number: int) -> str:
    content = f"{number}: name {number % 7 + 2} things that one finds at a beach."
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 24,
        "seed": number,
        "stream": True,
    }
    finish, done = "none", False
    url = f"{live.url}/v1/chat/completions"
    async with client.stream("POST", url, json=body) as response:
        async for line in response.aiter_lines():
            done |= line == "data: [DONE]"
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: ")).get("choices", []):
                    finish = choice["finish_reason"] or finish
    return finish if done else "cut"


def wrong_bodies(live: LiveService) -> Row:
    """A 4xx and a sentence for each; afterwards the service answers as before."""
    head = b'{"model": "%s", "messages": ' % MODEL.encode()
    user = b'[{"role": "user", "content": "x"}]'
    bodies = {
        "1 MB prompt": head + b'[{"role": "user", "content": "' + b"sand " * 210_000 + b'"}]}',
        "bad UTF-8": head + b'[{"role": "user", "content": "\xff\xfe"}]}',
        "negative number": head + user + b', "max_tokens": -5}',
        "NaN": head + user + b', "temperature": NaN}',
        "infinity": head + user + b', "top_p": 1e999}',
        "deep nesting": head + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "unknown field": head + user + b', "nonsense": 1}',
        "wrong type": head + user + b', "stop": {"a": 1}}',
        "not an object": b"[1, 2]",
        "empty": b"",
        "half a body": head + user,
        "lone surrogate": head + b'[{"role": "user", "content": "\\ud800"}]}',
    }
    wrong = []
    for name, body in bodies.items():
        answer = httpx.post(f"{live.url}/v1/chat/completions", content=body, timeout=60)
        sentence = answer.json().get("error", {}).get("message", "") if answer.content else ""
        if not 400 <= answer.status_code < 500 or not sentence.endswith("."):
            wrong.append(f"{name}: {answer.status_code} {sentence!r}")
    ready = live.get("/ready").status_code == 200
    measured = f"{len(bodies) - len(wrong)} of {len(bodies)}" + "".join(f"; {w}" for w in wrong)
    return Row("wrong bodies on the wire", "4xx with a sentence", measured, not wrong and ready)
