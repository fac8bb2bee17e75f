"""The whole service over the CPU kernels: hand-offs, batches and kills change no token there
either, and what those kernels do not take is refused when a replica starts."""

import asyncio

import pytest

from cluster.settings import Settings
from models.resolve import resolve
from serve import build
from tests.serving.tiny import (
    collect,
    decode,
    first_token,
    mixed_requests,
    replicas,
    run,
    serving,
    settings,
    slow,
    solo_tokens,
)


@pytest.fixture(scope="module")
def packed() -> build.Model:
    chosen = Settings.model_validate({"engine": {"kernels": "cpu"}})
    try:
        resolve(chosen.model)
    except ValueError as error:  # the model is not installed; a refusal of it would be a failure
        pytest.skip(str(error))
    return build.load(chosen)


@pytest.mark.parametrize("prefill", [0, 1], ids=["together", "apart"])
def test_every_request_gets_its_own_tokens(packed: build.Model, prefill: int):
    requests = mixed_requests(12, seed=3)

    async def work() -> None:
        async with serving(settings(prefill=prefill, decode=2), packed) as service:
            made = await asyncio.gather(*(collect(service, one) for one in requests))
            for one, tokens in zip(requests, made, strict=True):
                assert tokens == solo_tokens(packed, one)

    run(work())


def test_a_kill_changes_no_token(packed: build.Model):
    [one] = mixed_requests(1, seed=9)

    async def work() -> None:
        async with serving(settings(prefill=1, decode=2), packed) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            stream = asyncio.create_task(collect(service, one))
            await first_token(service, one.request_id)
            service.launcher.kill(str(service.ingress._records[one.request_id].replica_id))
            assert await stream == solo_tokens(packed, one)

    run(work())


def test_settings_that_contradict_are_refused():
    wrong = {"kernels": "cpu", "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="computes in float32, and engine.dtype is 'bfloat16'"):
        Settings.model_validate({"engine": wrong})
    with pytest.raises(ValueError, match="is only for engine.kernels = 'cpu'"):
        Settings.model_validate({"engine": {"activations": "fast"}})
