"""Proof rows of disaggregation on the default model: equal tokens however a request is served,
bytes handed over by their formula, and the speed of a hand-off between two processes."""

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing

from cluster.settings import Settings
from serve import build
from serve.engine.sequence import Limits, Request, Sampling
from serve.kv.pool import PagePool
from serve.kv.prefix import CacheKey
from serve.kv.storage import KVShape, KVStorage
from serve.local import LocalService
from serve.transport import Transport, open_transport
from tests.prove.lender import read_offer
from tests.prove.row import Row

REQUESTS = 200
AT_ONCE = 24
HANDOFF_BYTES = 128 << 20
ROUNDS = 7


def rows(model: build.Model | None = None) -> Iterator[Row]:
    """Every row of this module, as it is measured."""
    yield handoff_speed()
    model = model or build.load(Settings())
    yield handed_bytes(model)
    yield from equal_tokens(model)


def mixed_requests(count: int, seed: int = 7) -> list[Request]:
    """Short and long prompts, some with a common beginning, greedy and seeded in turn."""
    chance = random.Random(seed)
    common = [chance.randrange(100, 40_000) for _ in range(96)]
    made = []
    for n in range(count):
        head = common[: 16 * chance.randrange(7)] if n % 3 == 0 else []
        prompt = head + [chance.randrange(100, 40_000) for _ in range(chance.randrange(4, 240))]
        greedy = Sampling(temperature=0.0)
        seeded = Sampling(0.9, top_k=50 * (n % 4 == 1), top_p=0.95, seed=1000 + n)
        limits = Limits(chance.randrange(6, 18), ignore_eos=True)
        sampling = seeded if n % 2 else greedy
        made.append(Request(f"r{n}", tuple(prompt), sampling, limits, CacheKey("", "", "")))
    return made


def equal_tokens(model: build.Model) -> Iterator[Row]:
    """The same requests through prefill and decode, through decode alone, and one by one."""
    requests = mixed_requests(REQUESTS)
    apart, remote = asyncio.run(serve_all(model, requests, prefill=1, at_once=AT_ONCE))
    together, _ = asyncio.run(serve_all(model, requests, prefill=0, at_once=AT_ONCE))
    alone, _ = asyncio.run(serve_all(model, requests, prefill=0, at_once=1, cached=False))
    tokens = sum(map(len, alone.values()))
    what = f"{REQUESTS} requests, {tokens} tokens"
    for name, other in (("P/D", apart), ("aggregated", together)):
        differ = sum(other[r] != alone[r] for r in alone)
        yield Row(f"{name} = solo, {what}", "0 differ", f"{differ} differ", differ == 0)
    yield Row("of these, prefilled remotely", "> 50", str(remote), remote > 50)


async def serve_all(
    model: build.Model, requests: list[Request], *, prefill: int, at_once: int, cached: bool = True
) -> tuple[dict[str, list[int]], int]:
    """Tokens by request id, and how many prompts a prefill replica computed."""
    settings = Settings.model_validate(
        {"prefill": {"replicas": prefill}, "engine": {"prefix_cache": cached}}
    )
    done: dict[str, list[int]] = {}
    async with LocalService(settings, model) as service:
        await until_ready(service, prefill + 1)
        slots = asyncio.Semaphore(at_once)

        async def one(request: Request) -> None:
            async with slots, aclosing(service.ingress.generate(request)) as deltas:
                done[request.request_id] = [t async for d in deltas for t in d.token_ids]

        await asyncio.gather(*(one(request) for request in requests))
        remote = sum(entry["state"]["remote_prefills"] for entry in await fresh_status(service))
    return done, remote


async def until_ready(service: LocalService, replicas: int) -> None:
    """Until so many replicas take work."""
    while sum(e.phase == "ready" for e in service.ingress.directory.entries) < replicas:
        await asyncio.sleep(0.05)


async def fresh_status(service: LocalService) -> list[dict[str, dict[str, int]]]:
    """The replicas' states, newer than the last thing they did."""
    await asyncio.sleep(1.2)
    return list((await service.ingress.status())["replicas"])


def handed_bytes(model: build.Model) -> Row:
    """Bytes that arrived in the receiver's memory for one prompt, counted there: a fresh storage
    is zero, so every row of K or V that is not zero came over."""
    tokens = 333
    config = model.decoder.config
    row_bytes = config.kv_heads * config.head_dim * model.decoder.dtype.itemsize
    expected = 2 * config.layers * tokens * row_bytes

    async def arrived() -> tuple[int, int]:
        settings = Settings.model_validate({"handoff": {"min_tokens": 1}})
        async with LocalService(settings, model) as service:
            await until_ready(service, 2)
            request = mixed_requests(1)[0]
            prompt = tuple(range(200, 200 + tokens))
            one = Request("bytes", prompt, request.sampling, Limits(1), request.cache_key)
            async with aclosing(service.ingress.generate(one)) as deltas:
                assert [d async for d in deltas][-1].finish is not None
            replica = next(
                m.replica for m in service.launcher.members.values() if m.role == "decode"
            )
            assert isinstance(replica.storage, KVStorage)
            written = int((replica.storage.tensor != 0).any(-1).any(-1).sum())
            counted = (await replica.ping()).handed_bytes
            return written * row_bytes, counted

    written, counted = asyncio.run(arrived())
    ok = written == counted == expected
    measured = f"{written:,} in memory, {counted:,} counted"
    return Row(f"KV bytes of a {tokens}-token prompt", f"{expected:,}", measured, ok)


def handoff_speed() -> Row:
    """128 MB of pages from another process into ours: request, offer, copy and acknowledgement."""
    shape = KVShape(layers=30, pages=4096 // 16, page_tokens=16, kv_heads=3, head_dim=64)
    name = f"sanderling-prove-{random.SystemRandom().randrange(1 << 32):x}"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.prove.lender", name, *map(str, shape)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    storage = KVStorage(shape, "float32")
    pages = PagePool(shape.pages, shape.page_tokens).allocate(shape.pages)
    assert pages is not None
    tokens = HANDOFF_BYTES // storage.token_bytes
    used = pages[: -(-tokens // shape.page_tokens)]
    transport = open_transport("shared_memory")
    try:
        rates = [_fetch(child, transport, storage, used, tokens) for _ in range(ROUNDS + 1)]
    finally:
        child.communicate(b"0\n")
        transport.close()
    rate = statistics.median(rates[1:])  # the first maps and touches everything once
    text = f"{rate / 1e9:.1f} GB/s (first {rates[0] / 1e9:.1f})"
    return Row("hand-off of 128 MB between processes", ">= 5 GB/s", text, rate >= 5e9)


def _fetch(
    child: "subprocess.Popen[bytes]",
    transport: Transport,
    storage: KVStorage,
    pages: list[int],
    tokens: int,
) -> float:
    """Bytes per second of one whole hand-off."""
    assert child.stdin is not None and child.stdout is not None
    started = time.perf_counter()
    child.stdin.write(f"{tokens}\n".encode())
    child.stdin.flush()
    offer = read_offer(child.stdout.readline())
    copied = transport.fetch(offer, storage, pages)
    child.stdin.write(b"-1\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"freed\n"
    assert copied == tokens * storage.token_bytes
    return copied / (time.perf_counter() - started)
