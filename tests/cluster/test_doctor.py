"""Each check of the doctor can say no, and the exit code follows."""

import importlib.metadata
import importlib.util
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.doctor import command, machine, packages
from cluster.doctor.finding import Finding
from cluster.settings import Settings


def settings(**sections: object) -> Settings:
    return Settings.model_validate(sections)


def test_a_taken_port_fails_and_a_free_one_does_not():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        finding = machine.port(settings(http={"port": number}))
        assert finding.state == "fail" and "--set http.port" in finding.todo
    assert machine.port(settings(http={"port": number})).state == "ok"


def test_a_host_that_is_not_ours_fails():
    assert machine.port(settings(http={"host": "192.0.2.1"})).state == "fail"


def test_no_compiler_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler().state == "fail"
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert machine.compiler().state == "fail"
    broken.write_text("#!/bin/sh\necho 'g++ 12.2'\n")
    assert machine.compiler() == Finding("C++ compiler", "ok", "g++ 12.2")


def test_vector_instructions_are_read(tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n")
    finding = machine.processor(cpuinfo)
    assert finding.state == "ok" and finding.found.endswith("avx2, avx512f, avx512_vnni")
    cpuinfo.write_text("flags : fpu sse2\n")
    assert machine.processor(cpuinfo).state == "warn"
    assert machine.processor(tmp_path / "none").state == "warn"


def test_memory_follows_the_settings():
    small = settings(prefill={"replicas": 0}, decode={"memory_bytes": 1 << 30})
    need = machine.needed_bytes(small)
    assert need == (1 << 30) + small.ray.object_store_bytes + machine.RAY_BYTES
    assert machine.memory(small, need).state == "ok"
    assert machine.memory(small, need - 1).state == "warn"
    assert machine.memory(small, need // 2 - 1).state == "fail"
    more = settings(prefill={"replicas": 3}, decode={"memory_bytes": 1 << 30})
    assert machine.needed_bytes(more) == need + 3 * more.prefill.memory_bytes


def test_shared_memory_follows_transport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = Settings().ray.object_store_bytes + 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: FakeUsage(free))
    assert machine.shared_memory(Settings(), tmp_path).state == "warn"
    assert machine.shared_memory(settings(handoff={"transport": "ray_object"})).state == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: FakeUsage(free - 2))
    assert machine.shared_memory(Settings(), tmp_path).state == "fail"
    assert machine.shared_memory(Settings(), tmp_path / "none").state == "fail"


class FakeUsage:
    """What shutil.disk_usage returns, as far as it is read."""

    def __init__(self, free: int) -> None:
        self.free = free


def test_another_python_fails():
    assert packages.python((3, 12)).state == "fail"
    assert packages.python((3, 11)).state == "ok"


def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch):
    versions = {"torch": "2.13.0+cpu", "ray": "2.59.0", "numpy": None}
    lines = ["torch==2.13.0", "ray[serve]==2.60.*", "numpy>=2", 'pytest>=9; extra == "test"']
    monkeypatch.setattr(packages, "_version", versions.get)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    finding = packages.requirements()
    assert finding.state == "fail"
    assert finding.found == "ray is 2.59.0, needed is ==2.60.*; numpy is missing"


def test_a_clashing_distribution_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "_version", {"kernels": "0.9"}.get)
    assert packages.names().state == "fail"


def test_a_foreign_ray_address_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    assert packages.ray({}).state == "ok"
    assert packages.ray({"RAY_ADDRESS": "10.0.0.1:6379"}).state == "warn"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert packages.ray({}).state == "fail"


def test_a_missing_model_wheel_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert packages.MODEL_WHEEL in packages.model(Settings()).todo
    assert packages.model(Settings()).state == "fail"
    assert packages.model(settings(model="elsewhere")).state == "ok"


@pytest.mark.parametrize(("states", "code"), [("ok warn", 0), ("ok fail warn", 1)])
def test_exit_code_and_json(states: str, code: int, monkeypatch: pytest.MonkeyPatch):
    findings = [Finding(f"c{i}", state, "found") for i, state in enumerate(states.split())]  # type: ignore[arg-type]
    monkeypatch.setattr(command, "examine", lambda settings, progress: findings)
    answer = CliRunner().invoke(command.doctor, ["--json"])
    assert answer.exit_code == code
    assert [row["state"] for row in json.loads(answer.stdout)] == states.split()
    drawn = CliRunner().invoke(command.doctor, [])
    assert drawn.exit_code == code and all(finding.check in drawn.stdout for finding in findings)


def test_every_check_runs_on_this_machine():
    """No check raises here, and Python is right, or these tests would not run."""
    cheap = [check for words, check in command.checks(Settings()) if "imports" not in words]
    findings = [check() for check in cheap]
    assert all(finding.found for finding in findings)
    assert findings[0] == packages.python(sys.version_info[:2])
