"""The whole service over the CPU kernels: hand-offs, batches and kills change no token there
either, and what those kernels do not take is refused when a replica starts."""

import asyncio
from typing import Any

import pytest

from cluster.settings import Settings
from models.packed import PackedDecoder
from models.resolve import resolve
from serve import build
from tests.models.tiny import write_byte_level
from tests.serving.tiny import (
    collect,
    decode,
    first_token,
    mixed_requests,
    replicas,
    request,
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


def over(kv_dtype: str, **chosen: Any) -> Settings:
    """Settings of the CPU kernels over such a cache."""
    return settings(engine={"kernels": "cpu", "kv_dtype": kv_dtype}, **chosen)


@pytest.mark.parametrize(
    "prefill,kv_dtype,count",
    [(0, "float32", 12), (1, "float32", 12), (0, "int4", 4), (1, "int8", 4)],
    ids=["together", "apart", "together in int4", "apart in int8"],
)
def test_every_request_gets_its_own_tokens(
    packed: build.Model, prefill: int, kv_dtype: str, count: int
):
    requests = mixed_requests(count, seed=3)

    async def work() -> None:
        async with serving(over(kv_dtype, prefill=prefill, decode=2), packed) as service:
            made = await asyncio.gather(*(collect(service, one) for one in requests))
            for one, tokens in zip(requests, made, strict=True):
                assert tokens == solo_tokens(packed, one, kv_dtype)
            many = [decode(service, name) for name in replicas(service, "decode")]
            assert (sum(replica.handed_bytes for replica in many) > 0) == bool(prefill)

    run(work())


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_a_kill_changes_no_token(packed: build.Model, kv_dtype: str):
    [one] = mixed_requests(1, seed=9)

    async def work() -> None:
        async with serving(over(kv_dtype, prefill=1, decode=2), packed) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            stream = asyncio.create_task(collect(service, one))
            await first_token(service, one.request_id)
            service.launcher.kill(str(service.ingress._records[one.request_id].replica_id))
            assert await stream == solo_tokens(packed, one, kv_dtype)

    run(work())


@pytest.mark.parametrize("transport", ["shared_memory", "ray_object"])
@pytest.mark.parametrize("kv_dtype,head_bytes", [("float16", 128), ("int8", 68), ("int4", 40)])
def test_a_hand_off_moves_what_the_format_takes(
    packed: build.Model, transport: str, kv_dtype: str, head_bytes: int
):
    """37 tokens, and of the second prompt what the first did not bring: pages have 4 tokens."""
    config, head = packed.decoder.config, list(range(100, 120))
    token_bytes = 2 * config.layers * config.kv_heads * head_bytes

    async def work() -> None:
        async with serving(over(kv_dtype, transport=transport), packed) as service:
            replica = decode(service)
            await collect(service, request("a", [*head, *range(200, 217)], 2))
            assert replica.handed_bytes == 37 * token_bytes
            one = request("b", [*head, *range(300, 311)], 2)
            assert await collect(service, one) == solo_tokens(packed, one, kv_dtype)
            assert replica.handed_bytes == (37 + 11) * token_bytes

    run(work())


def test_auto_takes_the_cpu_kernels_where_they_take_the_model(packed, tmp_path, caplog):
    """The default model runs on them, with float16 keys and values. A file of another shape runs on
    the reference, which is said; asked for what only they can do, it is refused."""
    chosen = Settings()
    model = build.load(chosen)
    assert (build.kernels(model), build.kv_format(chosen, model)) == ("cpu", "float16")
    exact = Settings.model_validate({"engine": {"kernels": "reference"}})
    model = build.load(exact)
    assert (build.kernels(model), build.kv_format(exact, model)) == ("reference", "float32")
    other = str(write_byte_level(tmp_path / "other.gguf"))
    with caplog.at_level("INFO", logger="serve.build"):
        odd = Settings.model_validate({"model": other})
        assert build.kernels(build.load(odd)) == "reference"
    assert "takes the reference kernels" in caplog.text
    with pytest.raises(ValueError, match="cannot be computed with engine.kernels = 'cpu'"):
        build.load(Settings.model_validate({"model": other, "engine": {"kv_dtype": "int8"}}))


@pytest.mark.parametrize("units", [True, False])
def test_a_setting_without_effect_is_said(packed, units, caplog, monkeypatch):
    """The decoder does as the setting says, and on a processor without AMX that changes nothing."""
    chosen = Settings.model_validate({"engine": {"kernels": "cpu", "batch_invariant": False}})
    monkeypatch.setattr("models.packed.ops.has_matrix_units", lambda: units)
    with caplog.at_level("WARNING", logger="serve.build"):
        model = build.load(chosen)
    assert isinstance(model.decoder, PackedDecoder) and not model.decoder.batch_invariant
    assert ("batch_invariant = false changes nothing here" in caplog.text) == (not units)
    assert packed.decoder.batch_invariant  # the default


def test_settings_that_contradict_are_refused():
    wrong = {"kernels": "cpu", "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="computes in float32, and engine.dtype is 'bfloat16'"):
        Settings.model_validate({"engine": wrong})
    with pytest.raises(ValueError, match="activations = 'fast' is only for the CPU kernels"):
        Settings.model_validate({"engine": {"activations": "fast", "kernels": "reference"}})
    with pytest.raises(ValueError, match="batch_invariant = False is only for the CPU kernels"):
        Settings.model_validate({"engine": {"batch_invariant": False, "kernels": "reference"}})
    with pytest.raises(ValueError, match="kv_dtype = 'int8' is only for the CPU kernels"):
        Settings.model_validate({"engine": {"kv_dtype": "int8", "dtype": "bfloat16"}})
    with pytest.raises(ValueError, match="'float32', 'float16', 'int8' or 'int4'"):
        Settings.model_validate({"engine": {"kernels": "cpu", "kv_dtype": "fp8"}})
