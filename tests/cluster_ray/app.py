"""A small ingress for the live tests: empty answers, an endless stream, and a slow answer.

Writes what happens to its requests into the file that the variable EVENTS_FILE names.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve as ray_serve

from cluster.raylocal.actors import find, list_named
from cluster.raylocal.private import confine_replica

api = FastAPI()


def note(event: str) -> None:
    with Path(os.environ["EVENTS_FILE"]).open("a", encoding="utf-8") as file:
        file.write(f"{event}\n")


@api.get("/noop")
async def noop() -> Response:
    return Response(b"ok")


@api.get("/busy")
async def busy() -> Response:
    return JSONResponse({"error": "busy"}, 503, headers={"Retry-After": "7"})


@api.get("/names")
async def names() -> list[str]:
    """What an ingress replica sees of our actors; its own namespace is Serve's."""
    assert find("none such") is None
    return list_named()


@api.get("/stream")
async def stream() -> StreamingResponse:
    async def events() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            note("stream cancelled")
            raise

    return StreamingResponse(events(), media_type="text/event-stream")


@api.get("/slow")
async def slow() -> Response:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        note("slow cancelled")
        raise
    return Response(b"late")


@ray_serve.deployment(ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=1)
@ray_serve.ingress(api)
class Ingress:
    def __init__(self) -> None:
        confine_replica()


@ray_serve.deployment(ray_actor_options={"num_cpus": 0}, max_constructor_retry_count=1)
class Broken:
    def __init__(self) -> None:
        raise RuntimeError("no weights here")


def ingress() -> Any:
    return Ingress.bind()  # type: ignore[attr-defined]


def broken() -> Any:
    return Broken.bind()  # type: ignore[attr-defined]
