"""A random two-layer model, a service over it in this process, and what its tokens must be.

`solo_tokens` runs the decoder over the whole sequence for every token: no engine, no cache, no
chunks. Logits are spread widely, so that rounding cannot change a token.
"""

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import tokenizers
import torch
from tokenizers.models import BPE

from cluster.settings import Settings
from models.batch import TokenBatch
from models.config import ModelConfig
from models.decoder import Decoder
from models.detokenize import BYTE_OF_CHARACTER
from models.device.decoder import DeviceDecoder
from models.load.text import TextModel
from models.packed import PackedDecoder
from models.tokenizer import Tokenizer
from serve.build import Model
from serve.decode import DecodeReplica
from serve.engine.runner import Rows
from serve.engine.sampler import Draw, sample
from serve.engine.scheduler import Slice
from serve.engine.sequence import Delta, Limits, Request, Sampling
from serve.kv.prefix import CacheKey
from serve.kv.storage import KVShape, KVStorage
from serve.local import LocalService
from serve.machines.service import MachineService
from serve.prefill import PrefillReplica

PAGE_TOKENS = 4
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # K and V, layers, kv_heads, head_dim, float32
KEY = CacheKey("tenant", "", "")
DEADLINE_S = 60.0  # for what takes well under a second unless something is broken


def tokenizer() -> Tokenizer:
    """Bytes and one end token."""
    backend = tokenizers.Tokenizer(BPE(vocab=dict(BYTE_OF_CHARACTER), merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    end = backend.token_to_id("<end>")
    assert end is not None
    return Tokenizer(
        backend, source="tiny", bos_token_id=None, eos_token_ids=(end,), special_texts={}
    )


def random_model(seed: int = 0) -> Model:
    text = tokenizer()
    config = ModelConfig(
        name="tiny",
        layers=2,
        hidden=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ff=48,
        vocab=text.vocab_size,
        context_tokens=4096,
        rms_eps=1e-5,
        eos_token_ids=text.eos_token_ids,
    )
    decoder = Decoder(config).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        parameter.normal_(0, 0.4, generator=generator)
        if "norm" in name:
            parameter.fill_(1.0)
    return Model(decoder, TextModel(config, text, None))


def logits_of(
    decoder: Decoder | PackedDecoder, tokens: list[int], kv_format: str = "float32"
) -> torch.Tensor:
    """[1, vocab] after the whole sequence in one go, on a cache of its own."""
    count, config = len(tokens), decoder.config
    pages = -(-count // PAGE_TOKENS)
    shape = KVShape(config.layers, pages, PAGE_TOKENS, config.kv_heads, config.head_dim)
    kv = KVStorage(shape, kv_format).tensor
    everything = torch.arange(count)
    batch = TokenBatch(
        torch.tensor(tokens),
        everything,
        everything,
        (0, count),
        (count,),
        torch.arange(pages)[None],
        torch.tensor([count - 1]),
    )
    with torch.inference_mode():
        logits: torch.Tensor = decoder(batch, kv)
    return logits


def solo_tokens(model: Model, request: Request, kv_format: str = "float32") -> list[int]:
    """What a request must yield. Stop strings are bytes here, one token each."""
    limits, output = request.limits, list[int]()
    eos = model.text.tokenizer.eos_token_ids
    ends = () if limits.ignore_eos else eos
    assert not isinstance(model.decoder, DeviceDecoder), "the oracle computes on the CPU"
    while True:
        tokens = [*request.prompt, *output]
        banned = eos if len(output) < limits.min_tokens else ()
        logits = logits_of(model.decoder, tokens, kv_format)
        draw = Draw(request.sampling, len(tokens), banned, request.prompt, tuple(output))
        output += sample(logits, [draw])
        counted = model.text.tokenizer.decode(output[max(limits.min_tokens - 1, 0) :])
        early = len(output) < limits.min_tokens
        stopped = output[-1] in ends or any(stop in counted for stop in limits.stop)
        if (stopped and not early) or len(output) == limits.max_tokens:
            return output


def request(
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008
    **limits: Any,
) -> Request:
    return Request(request_id, tuple(prompt), sampling, Limits(max_tokens, **limits), KEY)


def mixed_requests(count: int, seed: int, longest: int = 60) -> list[Request]:
    """Greedy and seeded, short and long, many with a prefix in common."""
    rng = random.Random(seed)
    heads = [[rng.randrange(256) for _ in range(rng.randint(9, 30))] for _ in range(4)]
    requests = []
    for number in range(count):
        tail = rng.choice([rng.randint(1, 6), rng.randint(7, longest - 30)])
        prompt = rng.choice([[], *heads]) + [rng.randrange(256) for _ in range(tail)]
        sampling = Sampling(
            rng.choice([0.0, 1.0]),
            rng.choice([0, 40]),
            seed=rng.getrandbits(60),
            frequency_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            logit_bias=rng.choice([(), ((65, 2.0), (7, -100.0))]),
        )
        max_tokens = rng.randint(1, 16)
        requests.append(
            request(
                f"r{seed}-{number}",
                prompt,
                max_tokens,
                sampling,
                min_tokens=rng.choice([0, max_tokens // 2]),
                stop=rng.choice([(), ("a", "B"), ("zz",)]),
            )
        )
    return requests


def settings(
    prefill: int = 1,
    decode: int = 1,
    *,
    transport: str = "shared_memory",
    kv_tokens: int = 1024,
    budget_tokens: int = 32,
    max_running: int = 8,
    engine: dict[str, Any] | None = None,
    **handoff: Any,
) -> Settings:
    """Small pools, quick looks of the controller."""
    return Settings.model_validate(
        {
            "engine": {
                "page_tokens": PAGE_TOKENS,
                "kv_tokens": kv_tokens,
                "budget_tokens": budget_tokens,
                "max_running": max_running,
                **(engine or {}),
            },
            "prefill": {"replicas": prefill},
            "decode": {"replicas": decode},
            "handoff": {"transport": transport, "min_tokens": 8, **handoff},
            "controller": {
                "period_s": 0.05,
                "ping_deadline_s": 30.0,
                "start_deadline_s": 60.0,
            },
        }
    )


def run(work: Coroutine[Any, Any, None], expected: tuple[str, ...] = ()) -> None:
    """Run an async test: it ends within DEADLINE_S, and the errors that nobody awaited (asyncio
    would log them) are those `expected`."""
    unseen: list[str] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: unseen.append(str(context.get("exception", context["message"])))
        )
        async with asyncio.timeout(DEADLINE_S):
            await work
        await end_tasks()
        gc.collect()

    asyncio.run(guarded())
    assert tuple(unseen) == expected, unseen


async def end_tasks() -> set[asyncio.Task[Any]]:
    """Cancel what still runs beside the caller; returns what that was."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return {task for task in others if task is not None}


async def until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(chosen: Settings, model: Model) -> AsyncIterator[LocalService]:
    """A service that is ready; in the end all of it must be as it was before the first request."""
    before = asyncio.all_tasks()
    async with LocalService(chosen, model) as service:
        await ready(service)
        yield service
        await settled(service)
    await until(lambda: asyncio.all_tasks() <= before)


async def ready(service: LocalService) -> None:
    """Until every replica that is wanted serves and the ingress knows."""
    wanted = service.controller.wanted

    def all_ready() -> bool:
        known = service.ingress.directory
        return all(len(known.ready(role)) == count for role, count in wanted.items())

    await until(all_ready)


async def settled(service: LocalService) -> None:
    """Until every page is free or merely cached, no lease is out, and nobody has a request."""
    await until(lambda: all(at_rest(service, name) for name in service.launcher.members))
    await until(lambda: not service.ingress._records and not service.ingress._load_tokens)


def at_rest(service: LocalService, replica_id: str) -> bool:
    replica = service.launcher.members[replica_id].replica
    stats = replica.loop.engine.stats()
    mine: tuple[object, ...]
    if isinstance(replica, PrefillReplica):
        mine = (len(replica.leases), replica._waiting)
    else:
        mine = (replica._jobs, replica.peers._lenders, replica.peers._load_tokens)
    idle = not (stats.running or stats.waiting or stats.reserved or stats.held or any(mine))
    return idle and stats.free_pages + stats.evictable_pages == stats.pages


async def first_token(service: LocalService, request_id: str) -> None:
    """Until a request that was just begun has delivered a token."""
    records = service.ingress._records
    await until(lambda: request_id in records and bool(records[request_id].sequence.output))


def replicas(service: LocalService, role: str) -> list[str]:
    return [name for name, member in service.launcher.members.items() if member.role == role]


def decode(service: LocalService, replica_id: str | None = None) -> Any:
    """The decode replica of that name, or the only one; Any, since tests replace its methods."""
    replica = service.launcher.members[replica_id or replicas(service, "decode")[0]].replica
    assert isinstance(replica, DecodeReplica)
    return replica


def prefill(service: LocalService, replica_id: str | None = None) -> Any:
    """The prefill replica of that name, or the only one; Any, since tests replace its methods."""
    replica = service.launcher.members[replica_id or replicas(service, "prefill")[0]].replica
    assert isinstance(replica, PrefillReplica)
    return replica


async def collect(service: LocalService | MachineService, one: Request) -> list[int]:
    """All tokens of a request; deltas must have exactly one finish, at the end."""
    deltas: list[Delta] = []
    async with aclosing(service.ingress.generate(one)) as stream:
        async for delta in stream:
            deltas.append(delta)
    assert [d.finish is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].finish in ("stop", "length"), deltas[-1]
    assert len({d.cached_tokens for d in deltas}) == 1, "cached_tokens changed under way"
    return [token for delta in deltas for token in delta.token_ids]


def slow(replica: DecodeReplica | PrefillReplica) -> None:
    """Let every step of a replica's engine take a while, so that it can be met in the middle."""
    compute = replica.loop.engine.runner.run

    def slowly(slices: list[Slice]) -> Rows:
        time.sleep(0.02)
        return compute(slices)

    replica.loop.engine.runner.run = slowly  # type: ignore[method-assign]
