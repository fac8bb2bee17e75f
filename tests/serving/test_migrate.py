"""A draining replica's live sequences go on elsewhere, from their pages where the plan says so."""

import asyncio

import pytest

from tests.serving.tiny import (
    TOKEN_BYTES,
    collect,
    decode,
    ready,
    replicas,
    request,
    run,
    serving,
    settings,
    slow,
    solo_tokens,
    until,
)

PROMPT = list(range(40))


async def drained(service, requests, deadline_s=1.0):
    """Begin streams, drain one replica in their middle; (tokens of each, whom it had)."""
    for name in replicas(service, "decode"):
        slow(decode(service, name))
    streams = [asyncio.create_task(collect(service, one)) for one in requests]
    records = service.ingress._records
    await until(
        lambda: (
            len(records) == len(requests)
            and all(len(r.sequence.output) > 2 for r in records.values())
        )
    )
    leaving = replicas(service, "decode")[0]
    had = [r.sequence.request_id for r in records.values() if r.replica_id == leaving]
    await service.controller.drain(leaving, deadline_s)
    assert leaving not in service.launcher.members
    return [await stream for stream in streams], had


def counted(service):
    """Sums over the decode replicas: (requests, tokens, bytes, failed, recomputed tokens)"""
    states = [decode(service, name) for name in replicas(service, "decode")]
    each = [replica.arrivals.counts for replica in states]
    again = sum(replica.loop.engine.recomputed_tokens for replica in states)
    return (
        sum(c.requests for c in each),
        sum(c.tokens for c in each),
        sum(c.bytes for c in each),
        sum(c.failed for c in each),
        again,
    )


@pytest.mark.parametrize("transport", ["shared_memory", "ray_object"])
def test_a_drain_moves_pages_and_computes_nothing_again(model, transport):
    async def work():
        requests = [request(f"r{n}", [n, *PROMPT], 80, ignore_eos=True) for n in range(6)]
        async with serving(settings(prefill=0, decode=2, transport=transport), model) as service:
            tokens, had = await drained(service, requests)
            for one, got in zip(requests, tokens, strict=True):
                assert got == solo_tokens(model, one)
            moved, moved_tokens, moved_bytes, failed, again = counted(service)
            assert had and moved == len(had) and failed == 0
            assert again == 0
            assert moved_tokens > len(had) * len(PROMPT)
            assert moved_bytes == moved_tokens * TOKEN_BYTES
            await ready(service)

    run(work())
