"""The settings inside the chart are a laptop's: one schema, and what rolls when they change."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.settings import Settings, SettingsError, resolve
from tests.helm.chart import EXAMPLES, Body, Helm, documents, groups, of, settings_text

NAMES = ("defaults", *(path.stem for path in EXAMPLES))
SHARES = {"a10g-spot": (1, 9, 1), "h100-on-demand-and-spot": (2, 10, 2), "mi300-mixed": (2, 10, 1)}


def resolved(objects: list[Body], folder: Path) -> Settings:
    """As `sanderling up -c` reads the file."""
    file = folder / "sanderling.toml"
    file.write_text(settings_text(objects))
    return resolve(file).settings


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_a_laptops(rendered: Mapping[str, list[Body]], name: str, tmp_path: Path):
    settings = resolved(rendered[name], tmp_path)
    assert (settings.http.host, settings.http.port) == ("0.0.0.0", 8000)
    assert settings.ray.address == "auto" and settings.ray.auth == "token"
    decode = settings.autoscale.decode
    if name in SHARES:
        assert (decode.floor, decode.cap, decode.on_demand) == SHARES[name]
    assert settings.decode.replicas == decode.floor
    service = of(rendered[name], "RayService")["spec"]["rayClusterConfig"]
    if not service["enableInTreeAutoscaling"] and name != "cpu-dev":
        kubernetes = settings.autoscale.kubernetes
        assert settings.autoscale.provider == "kubernetes"
        assert (kubernetes.namespace, kubernetes.service) == ("models", "x-sanderling-serve")
        assert settings.autoscale.service_url == "http://x-sanderling.models.svc:80"


def test_what_the_values_say_arrives(helms: Mapping[int, Helm], tmp_path: Path):
    """Texts with quotes and backslashes, whole and broken numbers, true and false, in both."""
    said = tmp_path / "values.yaml"
    said.write_text(
        "settings:\n  model: 'a\"b\\c é'\n  migrate: {link_bytes_per_s: 2.5e9, lossy: true}\n"
        "  autoscale: {quantile: 0.75, short_usd_per_h: 3}\n  engine: {kv_tokens: 1048576}\n"
        "  prefill: {replicas: 0, memory_bytes: 68719476736}\n"
    )
    for helm in helms.values():
        settings = resolved(documents(helm.template(f"--values={said}")), tmp_path)
        assert settings.model == 'a"b\\c é'
        assert settings.migrate.link_bytes_per_s == 2.5e9 and settings.migrate.lossy is True
        assert (settings.autoscale.quantile, settings.autoscale.short_usd_per_h) == (0.75, 3.0)
        assert settings.engine.kv_tokens == 1048576
        assert settings.prefill.memory_bytes == 68719476736


def test_a_file_that_is_no_laptops_is_noticed(rendered: Mapping[str, list[Body]], tmp_path: Path):
    file = tmp_path / "wrong.toml"
    file.write_text(settings_text(rendered["defaults"]).replace("port = 8000", "port = 8000.0"))
    with pytest.raises(SettingsError, match="http.port"):
        resolve(file)


def checksums(objects: list[Body]) -> tuple[str, str]:
    """What Ray's pods and the controller's roll by."""
    front = groups(objects)["front"]["template"]["metadata"]["annotations"]["checksum/settings"]
    deployment = of(objects, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    return front, deployment["checksum/settings"]


def test_a_change_rolls_whom_it_concerns(helms: Mapping[int, Helm]):
    worker = "--set=workers.c.kind=cpu,workers.c.onDemand.min=1,workers.c.onDemand.max=2"

    def after(*flags: str) -> tuple[str, str]:
        return checksums(documents(helms[4].template(worker, *flags)))

    before = after()
    assert after() == before
    engine = after("--set=settings.engine.max_running=16")
    assert engine[0] != before[0] and engine[1] != before[1]
    for bounds in ("workers.c.onDemand.max=5", "workers.c.onDemand.min=2"):
        ray, controller = after(f"--set={bounds}")
        assert ray == before[0] and controller != before[1], bounds
    assert after("--set=monitoring.dashboard.enabled=true") == before


def test_bounds_move_no_pod(helms: Mapping[int, Helm]):
    """Nothing that KubeRay compares changes with a min, a max or a toleration, as the upgrade's
    test believes; more replicas of the autoscaler's are none of Helm's business."""
    worker = "--set=workers.c.kind=cpu,workers.c.onDemand.min=1,workers.c.onDemand.max="
    mute = ("replicas", "minReplicas", "maxReplicas")
    small, large = (groups(documents(helms[4].template(f"{worker}{most}"))) for most in (2, 9))
    assert small["c-od"]["maxReplicas"] == 2 and large["c-od"]["maxReplicas"] == 9
    for group in (*small.values(), *large.values()):
        for name in mute:
            del group[name]
    assert small == large
