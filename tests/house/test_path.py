"""The request path of serve/README.md is the path that a real request takes."""

import asyncio
import re
import sys
from pathlib import Path

import httpx

from cluster.settings import Settings
from serve import build
from serve.http import EdgeSettings, build_app
from serve.local import LocalService

README = Path(__file__).parents[2] / "serve" / "README.md"
# Busy on their own account while requests come and go: watching, health, the one-process wiring.
BACKGROUND = {"serve.local", "serve.controller", "serve.follow", "serve.state", "serve.status"}
BACKGROUND |= {
    "serve.events",
    "serve.engine.stats",
    "serve.build",
    "serve.service",
    "serve.clients",
}
# What an engine without work does, and the watchers' view of it.
IDLE = {"_take_calls", "_patience_s", "_rest", "has_work", "check", "stats", "update", "_sweep"}
IDLE |= {"ping", "_forget_silent", "directory", "find", "_keep_alive", "sweep", "clear", "_step"}
IDLE |= {"_end_all", "__len__"}  # of leases, which a sweep and a ping do
IDLE |= {"heard", "_open", "forget_silent", "close_silent"}  # of channels, likewise


class Tracer:
    """Notes modules of ours in the order of their first call, over several threads."""

    def __init__(self):
        self.on = False
        self.entered: list[str] = []

    def __call__(self, frame, event, _argument):
        if event != "call" or not self.on or frame.f_code.co_name in IDLE:
            return
        name = frame.f_globals.get("__name__", "")
        known = name in self.entered or name in BACKGROUND
        if name.startswith("serve.") and not known:
            self.entered.append(name)


async def traced_request() -> list[str]:
    tracer = Tracer()
    settings = Settings.model_validate({"handoff": {"min_tokens": 16}})
    model = build.load(settings)
    async with LocalService(settings, model) as service:
        app = build_app(service.ingress, model.text, EdgeSettings(model="m"))
        while sum(e.phase == "ready" for e in service.ingress.directory.entries) < 2:
            await asyncio.sleep(0.05)
        for member in service.launcher.members.values():
            hook = member.replica.loop.call(lambda _: sys.setprofile(tracer))
            await asyncio.wrap_future(hook)
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "What is the capital of France? Think well."}],
            "max_tokens": 4,
            "temperature": 0,
            "stream": True,
        }
        transport = httpx.ASGITransport(app)
        sys.setprofile(tracer)
        tracer.on = True
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                answer = await client.post("/v1/chat/completions", json=body)
        finally:
            tracer.on = False
            sys.setprofile(None)
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    return tracer.entered


def test_the_path_of_a_request_is_the_one_in_the_readme():
    listed = re.findall(r"^\d+\. `(serve[\w.]*)`", README.read_text(), re.MULTILINE)
    assert asyncio.run(traced_request()) == listed


def test_a_module_that_is_not_listed_is_noticed():
    tracer = Tracer()
    tracer.on = True
    sys.setprofile(tracer)
    try:
        from serve.engine.cost import StepCost

        StepCost().of(0, 1)
    finally:
        sys.setprofile(None)
    assert tracer.entered == ["serve.engine.cost"]
