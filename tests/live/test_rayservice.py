"""The service as KubeRay deploys it, on a Ray of several nodes: no host process, an ingress on the
front's node that counts as up when a token can be made, and a worker that leaves after a drain."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.raylocal.session import RaySession
from cluster.settings import resolve
from serve.leaving import leave, on_node
from serve.rayservice import Arguments, application, machines_key
from tests.cluster_ray.machine import free_port
from tests.live.service import wait_for
from tests.models.tiny import write_byte_level
from tests.prove.raynodes import LABEL, RayNodes, ray_nodes

UP_S = 240.0


def settings_file(folder: Path, address: str) -> Path:
    """As the chart writes it, but for a tiny model and labels of this test's nodes."""
    model = write_byte_level(folder / "tiny.gguf")
    file = folder / "sanderling.toml"
    file.write_text(
        f'model = "{model}"\ndata_dir = "{folder}"\n[ray]\naddress = "{address}"\n'
        "[engine]\nkv_tokens = 1024\n[prefill]\nreplicas = 0\n[controller]\n"
        f"start_deadline_s = {UP_S}\n"
        f'[decode]\ncpus = 1\nthreads = 1\n[decode.labels]\n"{LABEL}" = "!in(head,front)"\n'
    )
    return file


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    with ray_nodes({"front": 0, "one": 1, "two": 1}) as found:
        yield found


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_is_up_when_it_answers_and_a_worker_leaves(
    nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ray import serve as ray_serve

    for name, value in nodes.environment.items():
        monkeypatch.setenv(name, value)
    file, port = settings_file(tmp_path, nodes.address), free_port()
    arguments = Arguments(config=str(file), labels={LABEL: "front"})
    with RaySession(resolve(file).settings):
        options = ray_serve.HTTPOptions(host="127.0.0.1", port=port)
        ray_serve.start(proxy_location="HeadOnly", http_options=options)
        try:
            ray_serve.run(application(arguments), name="sanderling", route_prefix="/")
            url = f"http://127.0.0.1:{port}"
            assert httpx.get(f"{url}/ready", timeout=30).status_code == 200  # at once
            assert places("SERVE_REPLICA::") == {"front"}
            _leaves(url)
        finally:
            ray_serve.shutdown()


def _leaves(url: str) -> None:
    """Whose node goes hands its work over; somebody else answers."""
    (before,) = places("replica/")
    (node,) = [each for each in alive() if each["Labels"][LABEL] == before]
    assert leave(node["NodeID"], time.monotonic() + 120) == []
    assert on_node(node["NodeID"], "replica/") == []
    wait_for(lambda: bool(places("replica/") - {before}), "the replacement", UP_S)
    body = {"prompt": "a", "max_tokens": 3, "model": "tiny.gguf"}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1


def alive() -> list[dict[str, Any]]:
    """The cluster's nodes."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def places(prefix: str) -> set[str]:
    """On which nodes there are actors whose names begin so."""
    return {n["Labels"][LABEL] for n in alive() if on_node(n["NodeID"], prefix)}


def test_a_ray_of_its_own_is_refused(tmp_path: Path):
    file = tmp_path / "sanderling.toml"
    file.write_text('model = "smollm2-135m-instruct"\n')
    with pytest.raises(ValueError, match="'auto' is accepted"):
        application(Arguments(config=str(file)))


def test_the_machines_key_is_read_from_its_file(tmp_path: Path):
    file = tmp_path / "key"
    file.write_text("a key\n")
    assert machines_key(str(file)) == "a key" and machines_key("") is None
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        machines_key(str(file))
