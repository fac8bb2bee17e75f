"""POST /machines and /machines/leave: whoever rents machines says where replicas are placed.

Only with `http.machines_key`; without it there are no such paths. Called by serve.app.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal, Protocol

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.connection import read_body
from serve.errors import RequestError
from serve.openai import Wire, parse

MAX_BODY_BYTES = 1 << 20
# What a Ray node may be labelled with, as replicas' ids are made of it.
Machine = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]
DelaySeconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class Placing(Protocol):
    """See serve.controller.Controller."""

    async def place(self, role: str, machines: list[str], drain_s: float) -> None: ...

    async def leave(self, machine: str, deadline_s: float) -> None: ...


class PlaceRequest(Wire):
    """One replica of a role on each of these machines, and none elsewhere."""

    role: Literal["decode", "prefill"]
    machines: Annotated[list[Machine], Field(max_length=1024)]
    drain_s: DelaySeconds


class LeaveRequest(Wire):
    """Nothing more for a machine; what is there has so long to end or to move."""

    machine: Machine
    deadline_s: DelaySeconds


def placing_routes(placing: Placing, key: str) -> list[Route]:
    """key: as the setting holds it, "sha256:" and the digest."""

    def guarded(handle: Callable[[bytes], Awaitable[None]]) -> Callable[..., Awaitable[Response]]:
        async def answer(http: HttpRequest) -> Response:
            _refuse(http.headers.get("authorization"), key)
            await handle(await read_body(http, MAX_BODY_BYTES))
            return JSONResponse({"ok": True})

        return answer

    async def place(body: bytes) -> None:
        asked = parse(PlaceRequest, body)
        await placing.place(asked.role, asked.machines, asked.drain_s)

    async def leave(body: bytes) -> None:
        asked = parse(LeaveRequest, body)
        await placing.leave(asked.machine, asked.deadline_s)

    return [
        Route("/machines", guarded(place), methods=["POST"]),
        Route("/machines/leave", guarded(leave), methods=["POST"]),
    ]


def _refuse(authorization: str | None, key: str) -> None:
    sent = (authorization or "").removeprefix("Bearer ").strip()
    digest = "sha256:" + hashlib.sha256(sent.encode()).hexdigest()
    if not hmac.compare_digest(digest, key):
        text = "This path takes the key of http.machines_key, as Authorization: Bearer KEY."
        raise RequestError(401, "invalid_request_error", None, text, "invalid_api_key")
