"""POST /machines: only with its key, only what can be a machine, and it reaches the controller."""

import asyncio
import hashlib
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse

from cluster.settings import resolve
from serve.errors import RequestError
from serve.placing import placing_routes

KEY = "k3y"
PLACE = {"role": "decode", "machines": ["pod-1"], "drain_s": 30}
LEAVE = {"machine": "pod-1", "deadline_s": 5}


class Noted:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def place(self, role: str, machines: list[str], drain_s: float) -> None:
        self.calls.append((role, machines, drain_s))

    async def leave(self, machine: str, deadline_s: float) -> None:
        self.calls.append((machine, deadline_s))


def ask(path: str, body: Any, key: str | None = KEY) -> tuple[int, list[Any]]:
    """The answer's status and what reached the controller."""
    noted = Noted()
    held = resolve(sets=[f"http.machines_key={KEY}"]).settings.http.machines_key
    assert held == "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()

    async def refused(_: Any, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        return JSONResponse(error.body(), error.status)

    routes = placing_routes(noted, held)
    app = Starlette(routes=routes, exception_handlers={RequestError: refused})

    async def call() -> int:
        transport = httpx.ASGITransport(app=app)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return (await client.post(path, json=body, headers=headers)).status_code

    return asyncio.run(call()), noted.calls


def test_it_reaches_the_controller():
    assert ask("/machines", PLACE) == (200, [("decode", ["pod-1"], 30.0)])
    assert ask("/machines/leave", LEAVE) == (200, [("pod-1", 5.0)])


@pytest.mark.parametrize("key", [None, "", "other", "sha256:" + "0" * 64])
def test_without_its_key_nothing_happens(key: str | None):
    assert ask("/machines", PLACE, key) == (401, [])
    assert ask("/machines/leave", LEAVE, key) == (401, [])


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/machines", {"role": "train"}),
        ("/machines", {"machines": ["a.b"]}),
        ("/machines", {"machines": ["../x"]}),
        ("/machines", {"drain_s": -1}),
        ("/machines", {"more": 1}),
        ("/machines/leave", {"machine": ""}),
        ("/machines/leave", {"deadline_s": "soon"}),
    ],
)
def test_what_can_be_no_machine_is_refused(path: str, change: dict[str, Any]):
    good = PLACE if path == "/machines" else LEAVE
    assert ask(path, {**good, **change}) == (400, [])
