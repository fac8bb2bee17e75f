"""The page in a real browser, over the default model: it streams, stops, and fits a phone."""

import asyncio
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cluster.settings import Settings
from serve import build
from serve.http import EdgeSettings, build_app
from serve.local import LocalService

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine's PATH"),
]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@contextmanager
def service() -> Iterator[str]:
    """The URL of the whole service in this process."""
    settings = Settings()
    model = build.load(settings)
    started, servers = threading.Event(), list[uvicorn.Server]()

    async def serve() -> None:
        async with LocalService(settings, model) as local:
            app = build_app(local.ingress, model.text, EdgeSettings(model="smollm2"))
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
            servers.append(server)
            startup = server.startup

            async def noted(sockets: Any = None) -> None:
                await startup(sockets)
                started.set()

            server.startup = noted  # type: ignore[method-assign]
            await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(60)
    [server] = servers
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(60)


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


def until(page: Any, expression: str, deadline_s: float = 60.0) -> None:
    """Wait for a condition in the page, whose policy forbids what the browser driver would do."""
    end_s = time.monotonic() + deadline_s
    while not page.evaluate(expression):
        assert time.monotonic() < end_s, expression
        time.sleep(0.05)


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def test_a_person_can_chat_stop_and_watch(tmp_path: Path):
    with service() as url, browser() as chromium:
        page = chromium.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        errors: list[str] = []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#health.good")
        assert page.input_value("#key") == ""

        page.click("summary")
        page.fill("#temperature", "0")
        ask(page, "What is the capital of France?")
        until(page, "document.querySelector('#send').disabled === false")
        assert "Paris" in page.inner_text(".turn.assistant")
        note = page.inner_text("#speed")
        assert re.search(r"\d+ tokens, first after \d+ ms", note), note

        # A long answer moves the numbers, and Escape ends it.
        page.fill("#max_tokens", "2000")
        ask(page, "Count from one to five hundred, one number per line.")
        until(page, "Number(document.querySelector('#now-rate').textContent) > 0")
        until(page, "Number(document.querySelector('#now-running').textContent) >= 1")
        page.keyboard.press("Escape")
        until(page, "document.querySelector('#speed').textContent === 'Stopped.'")
        until(page, "Number(document.querySelector('#now-running').textContent) === 0")
        assert page.inner_text("#events").count("ready") >= 2
        assert len(page.query_selector_all("#replicas tr")) == 2

        # What anybody writes stays text.
        page.fill("#max_tokens", "1")
        ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
        until(page, "document.querySelector('#send').disabled === false")
        assert page.query_selector("#answers img, #answers b") is None

        page.screenshot(path=tmp_path / "wide-light.png")
        page.click("#theme")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.screenshot(path=tmp_path / "wide-dark.png")
        assert not errors, errors


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_every_control_has_a_name(tmp_path: Path, scheme: str):
    with service() as url, browser() as chromium:
        page = chromium.new_page(viewport={"width": 375, "height": 740}, color_scheme=scheme)
        page.goto(url)
        page.wait_for_selector("#health.good")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        page.click("summary")
        widest = page.evaluate("document.documentElement.scrollWidth")
        assert widest <= 375, "it scrolls sideways"
        table = "document.querySelector('.scroll')"
        cut = page.evaluate(f"{table}.scrollWidth - {table}.clientWidth")
        assert cut <= 0, f"the table of replicas loses {cut} px on the right"
        nameless = page.evaluate(
            "[...document.querySelectorAll('input, textarea, button')].filter(e => "
            "!(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.id)"
        )
        assert nameless == []
        page.screenshot(path=tmp_path / f"phone-{scheme}.png", full_page=True)
        reached = []
        page.focus("#prompt")
        for _ in range(5):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || 'other'"))
        assert {"clear", "send"} <= set(reached), reached
