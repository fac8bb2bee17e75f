"""The whole service over a GPU's decoder, where there is no GPU on the ops' torch references; which
kernels, device and number format the settings mean on a machine; and what is refused by name."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cluster.settings import Settings
from models.load import NotForDeviceError, load_for_device
from serve import build
from serve.computing import Computing, computing
from serve.kv.device import DeviceStorage
from serve.kv.storage import KVShape
from serve.transport import open_transport
from tests.models.device_models import DEVICE, RandomSource, on_device, oracle
from tests.models.tiny import save_folder, write_byte_level
from tests.serving.tiny import (
    collect,
    decode,
    mixed_requests,
    random_model,
    replicas,
    run,
    serving,
    settings,
    solo_tokens,
)


@pytest.fixture(scope="module")
def models() -> tuple[build.Model, build.Model]:
    """One random model, for a device and as the float32 oracle."""
    text = random_model().text
    config = replace(text.config, hidden=64, head_dim=32, ff=96, heads=2, kv_heads=1)
    source = RandomSource(config, "Q8_0")
    ours = build.Model(on_device(source, config), text)
    return ours, build.Model(oracle(source, config), text)


@pytest.mark.parametrize(
    "prefill,transport", [(0, "shared_memory"), (1, "shared_memory"), (1, "ray_object")]
)
def test_every_request_gets_its_own_tokens(
    models: tuple[build.Model, build.Model], prefill: int, transport: str
):
    """Apart, too: pages leave the device through the host's memory, and arrive."""
    ours, exact = models
    requests = mixed_requests(6, seed=4)
    chosen = settings(prefill, engine={"kernels": "triton", "device": "cpu"}, transport=transport)

    async def work() -> None:
        async with serving(chosen, ours) as service:
            made = await asyncio.gather(*(collect(service, one) for one in requests))
            for one, tokens in zip(requests, made, strict=True):
                assert tokens == solo_tokens(exact, one)
            many = [decode(service, name) for name in replicas(service, "decode")]
            assert (sum(replica.handed_bytes for replica in many) > 0) == bool(prefill)

    run(work())


@pytest.mark.parametrize("name", ["shared_memory", "ray_object"])
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 0])
def test_a_hand_off_between_devices(name: str, kv_format: str, tokens: int):
    shape = KVShape(layers=2, pages=6, page_tokens=4, kv_heads=3, head_dim=32)
    sender = DeviceStorage(shape, kv_format, DEVICE, f"sanderling-test-{os.getpid()}-device")
    target = DeviceStorage(shape, kv_format, DEVICE)
    for plane in sender.cache:
        if plane is not None:
            plane.copy_(torch.randint(1, 100, plane.shape).to(plane.dtype))
    transport, count = open_transport(name), -(-tokens // 4)
    theirs, ours = [5, 2][:count], [0, 4][:count]
    offer = transport.offer("lease", sender, theirs, 0, tokens)
    assert transport.fetch(offer, target, ours) == tokens * sender.token_bytes
    for got, wanted in zip(target.cache, sender.cache, strict=True):
        if got is not None and wanted is not None:
            moved = got[:, :, ours].flatten(2, 3)[:, :, :tokens]
            assert torch.equal(moved, wanted[:, :, theirs].flatten(2, 3)[:, :, :tokens])
            others = [page for page in range(6) if page not in ours]
            assert not got[:, :, others].any()
    transport.close()
    sender.close()


def given(**engine: Any) -> Settings:
    return Settings.model_validate({"engine": engine})


@pytest.mark.parametrize(
    "engine,gpu,wanted",
    [
        ({}, True, ("triton", "cuda", "bfloat16")),
        ({}, False, ("auto", "cpu", "float32")),
        ({"dtype": "float16"}, True, ("triton", "cuda", "float16")),
        ({"device": "cpu"}, True, ("auto", "cpu", "float32")),
        ({"device": "cuda:1"}, False, ("triton", "cuda:1", "bfloat16")),
        ({"kernels": "cpu"}, True, ("cpu", "cpu", "float32")),
        ({"kernels": "reference", "dtype": "bfloat16"}, True, ("reference", "cpu", "bfloat16")),
        ({"dtype": "bfloat16"}, False, ("reference", "cpu", "bfloat16")),
        ({"kernels": "triton"}, False, ("triton", "cuda", "bfloat16")),
        ({"kernels": "triton", "device": "cpu"}, True, ("triton", "cpu", "float32")),
    ],
)
def test_what_settings_mean_on_a_machine(
    engine: dict[str, Any], gpu: bool, wanted: Computing, monkeypatch, caplog
):
    monkeypatch.setattr("models.device.place.has_gpu", lambda: gpu)
    with caplog.at_level("INFO", logger="serve.computing"):
        assert computing(given(**engine)) == wanted
    chosen_here = gpu and "kernels" not in engine and "device" not in engine
    assert ("takes triton" in caplog.text) == chosen_here


@pytest.mark.parametrize(
    "engine,sentence",
    [
        ({"kernels": "cpu", "device": "cuda"}, "computes on a CPU, and engine.device is 'cuda'"),
        ({"kernels": "reference", "device": "cuda:1"}, "'cpu' and 'auto' are accepted with it"),
        ({"device": "gpu"}, '"auto", "cpu", "cuda" or "cuda:N"'),
        ({"kernels": "reference", "dtype": "float16"}, "'float16' is only for GPUs"),
        ({"kernels": "triton", "activations": "fast"}, "only for the CPU kernels; with"),
        ({"device": "cuda", "activations": "fast"}, "only for the CPU kernels; with"),
        ({"kernels": "reference", "kv_dtype": "int8"}, "only for the CPU kernels and GPUs"),
    ],
)
def test_settings_that_contradict_are_refused(engine: dict[str, Any], sentence: str, tmp_path):
    from cluster.settings.resolve import resolve

    file = tmp_path / "s.toml"
    lines = [f'{name} = "{value}"' for name, value in engine.items()]
    file.write_text("[engine]\n" + "\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        resolve(file=file, environ={}, flags={})
    assert sentence in str(refused.value)


def test_float16_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("models.device.place.has_gpu", lambda: False)
    with pytest.raises(ValueError, match="'float16' is only for GPUs, and torch finds none here"):
        computing(given(dtype="float16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tiny_gguf: Path):
    with pytest.raises(ValueError, match=r"engine.device = 'cuda' needs a GPU, and this torch \("):
        build.load(Settings.model_validate({"model": str(tiny_gguf), "engine": {"device": "cuda"}}))


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_file_of_many_formats_and_a_folder_are_taken(tiny_gguf: Path, tmp_path: Path):
    """Matrices that no kernel multiplies as they are stored are kept in the dtype."""
    chosen = {"engine": {"kernels": "triton", "device": "cpu", "kv_dtype": "float16"}}
    model = build.load(Settings.model_validate({"model": str(tiny_gguf), **chosen}))
    assert build.kernels(model) == "triton"
    assert build.kv_format(Settings.model_validate(chosen), model) == "float16"
    save_folder(tmp_path, "Llama")
    decoder = load_for_device(str(tmp_path), "cpu", "bfloat16")
    assert decoder.dtype == torch.bfloat16 and decoder.config.vocab == 160


def test_auto_goes_on_with_the_cpu_where_triton_does_not_take_the_model(
    tiny_gguf: Path, monkeypatch, caplog, tmp_path: Path
):
    """And says so; asked for by name, it is refused."""

    def refuse(*_: Any) -> None:
        raise NotForDeviceError("its heads have 512 values")

    monkeypatch.setattr("models.device.place.has_gpu", lambda: True)
    monkeypatch.setattr("models.load.load_for_device", refuse)
    common = {"model": str(tiny_gguf), "data_dir": str(tmp_path)}
    with caplog.at_level("INFO", logger="serve.build"):
        model = build.load(Settings.model_validate(common))
    assert build.kernels(model) == "reference"
    assert "does not take triton: its heads have 512 values" in caplog.text
    for engine in ({"kernels": "triton"}, {"device": "cuda"}):
        with pytest.raises(NotForDeviceError):
            build.load(Settings.model_validate({**common, "engine": engine}))


def test_large_heads_are_refused():
    config = replace(random_model().text.config, head_dim=320)
    with pytest.raises(NotForDeviceError, match="heads have 320 values, up to 256 are taken"):
        on_device(RandomSource(config, "F32"), config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be measured")
def test_measuring_a_gpu_that_is_not_there_is_refused():
    from serve.bench_command import bench

    done = CliRunner().invoke(bench, ["kernels", "--device", "cuda"])
    assert done.exit_code == 1 and "engine.device = 'cuda' needs a GPU" in done.output
