"""The page as it is sent: what its policy allows, and that it holds all it needs."""

import asyncio
import base64
import hashlib
import re

import httpx

from serve.http import EdgeSettings, build_app
from serve.page import policy
from tests.edge.fakes import MODEL, ScriptedService, tiny_text_model


def page() -> httpx.Response:
    app = build_app(ScriptedService(), tiny_text_model(), EdgeSettings(MODEL))

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            return await client.get("/")

    return asyncio.run(work())


def test_its_policy_runs_its_own_script_and_nothing_else():
    answer = page()
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    rules = answer.headers["content-security-policy"]
    [script] = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in rules
    assert "default-src 'none'" in rules and "connect-src 'self'" in rules
    assert "unsafe" not in rules
    assert policy(answer.text.replace("Stopped.", "Changed.")) != rules


def test_nothing_comes_from_outside_and_no_text_becomes_markup():
    text = page().text
    assert not re.findall(r"(?:src|href)=\"(?!data:,)", text)
    outside = set(re.findall(r"https?://[\w./]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not outside
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
