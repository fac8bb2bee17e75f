"""Proof rows of tenants on a real service: no prefix is shared between keys, none can say whose it
is, and too much waiting work is a 429 that says when to come back."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from serve.keys import KeyEntry, digest, new_key
from tests.live.service import MODEL, LiveService, service
from tests.prove.row import Row

PROMPT_TOKENS = 800
ROUNDS = 3
QUEUED_TOKENS = 2000
FLOOD = 12


class Asked(NamedTuple):
    """Seconds to the first token of one completion, and its prompt tokens from the cache."""

    first_s: float
    cached_tokens: int


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured."""
    keys = {tenant: new_key() for tenant in ("a", "b")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.toml"
        file.write_text("".join(_entry(tenant, key) for tenant, key in keys.items()))
        given = (f"http.api_keys_file={file}", f"admission.max_queued_tokens={QUEUED_TOKENS}")
        with service(*given) as live:
            yield from isolation(live, keys)
            yield refused_salt(live, keys["a"])
            yield over_the_cap(live, keys["a"])


def _entry(tenant: str, key: str) -> str:
    fields = KeyEntry(tenant=tenant, sha256=digest(key)).model_dump()
    lines = (f'{n} = "{v}"' if isinstance(v, str) else f"{n} = {v}" for n, v in fields.items())
    return "\n".join(("[[key]]", *lines, ""))


def isolation(live: LiveService, keys: dict[str, str]) -> Iterator[Row]:
    """The same prompts by one tenant twice, then by the other."""
    own, others, ratios = [], [], []
    for turn in range(ROUNDS):
        prompt = [100 + (turn * 997 + 37 * i) % 40_000 for i in range(PROMPT_TOKENS)]
        fresh = _ask(live, keys["a"], prompt)
        own.append(_ask(live, keys["a"], prompt).cached_tokens)
        other = _ask(live, keys["b"], prompt)
        others.append(other.cached_tokens)
        ratios.append(other.first_s / fresh.first_s)
    yield Row("a tenant's own prefix, the second time", "cached", f"{own} tokens", min(own) > 0)
    yield Row("the same prompt by another key", "0 cached", f"{others} tokens", not any(others))
    ratio = sorted(ratios)[ROUNDS // 2]
    text = f"{ratio:.2f} x a fresh prompt's"
    yield Row("its time to first token tells nothing", "0.7 to 1.4", text, 0.7 <= ratio <= 1.4)


def _ask(live: LiveService, key: str, prompt: list[int]) -> Asked:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    started_s = time.perf_counter()
    answer = _post(live, key, body)
    first_s = time.perf_counter() - started_s
    details = answer.raise_for_status().json()["usage"]["prompt_tokens_details"]
    return Asked(first_s, details["cached_tokens"])


def _post(live: LiveService, key: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{live.url}/v1/completions", json=body, headers=headers, timeout=120)


def refused_salt(live: LiveService, key: str) -> Row:
    """Neither a salt nor a tenant can be said in the body."""
    plain = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    fields = ("cache_salt", "salt", "tenant", "cache_key")
    statuses = [_post(live, key, {**plain, field: "b"}).status_code for field in fields]
    return Row("salt or tenant in the body", "400", f"{statuses}", set(statuses) == {400})


def over_the_cap(live: LiveService, key: str) -> Row:
    """More waiting prompts than may wait: the rest are told when to come back, none is lost."""
    answers = asyncio.run(_flood(live, key))
    done = [a for a in answers if a.status_code == 200]
    full = [a for a in answers if a.status_code == 429]
    waits = [int(a.headers.get("retry-after", 0)) for a in full]
    measured = f"{len(done)} served, {len(full)} refused, Retry-After {waits} s"
    ok = len(done) + len(full) == FLOOD and bool(done) and bool(full) and min(waits) >= 1
    return Row(f"{FLOOD} prompts over a cap of {QUEUED_TOKENS} tokens", "some 429", measured, ok)


async def _flood(live: LiveService, key: str) -> list[httpx.Response]:
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(timeout=300, headers=headers) as client:
        bodies = [
            {
                "model": MODEL,
                "prompt": [50 + (n * 31 + 7 * i) % 40_000 for i in range(PROMPT_TOKENS)],
                "max_tokens": 2,
            }
            for n in range(FLOOD)
        ]
        url = f"{live.url}/v1/completions"
        return await asyncio.gather(*(client.post(url, json=body) for body in bodies))
