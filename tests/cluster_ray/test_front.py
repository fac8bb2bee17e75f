"""The front's choices and refusals, and HAProxy's wrapper on real renderings; nothing started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.raylocal import haproxy
from cluster.raylocal.front import chosen_proxy, front_environment, refuse_taken_port
from cluster.settings import Settings, resolve


def settings_for(**http: str) -> Settings:
    return resolve(flags={f"http.{name}": value for name, value in http.items()}).settings


def test_auto_is_haproxy_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(haproxy, "available", lambda: True)
    assert chosen_proxy(settings_for(proxy="auto")) == "haproxy"
    assert chosen_proxy(settings_for(proxy="python")) == "python"
    monkeypatch.setattr(haproxy, "available", lambda: False)
    assert chosen_proxy(settings_for(proxy="auto")) == "python"
    with pytest.raises(ValueError, match='"python" or "auto" is accepted'):
        chosen_proxy(settings_for(proxy="haproxy"))


def test_python_proxy_needs_no_files(tmp_path: Path):
    variables = front_environment(settings_for(proxy="python"), tmp_path)
    assert variables == {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    assert list(tmp_path.iterdir()) == []


def test_taken_port_is_refused_by_name():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        refuse_later = settings_for(port=str(port))
        other.listen()
        with pytest.raises(ValueError, match=rf"http\.port = {port} is in use on 127\.0\.0\.1"):
            refuse_taken_port(refuse_later)
    refuse_taken_port(refuse_later)


def test_cooling_port_is_free():
    """A proxy that just closed its connections leaves TIME_WAIT; that is no other program."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as HAProxy and uvicorn do
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # the closer is the one that waits
            assert client.recv(1) == b""
    refuse_taken_port(settings_for(port=str(port)))


def test_foreign_address_is_refused_by_name():
    with pytest.raises(ValueError, match=r"http\.host = '203\.0\.113\.7' is not an address"):
        refuse_taken_port(settings_for(host="203.0.113.7"))


@pytest.mark.skipif(not haproxy.available(), reason="no HAProxy comes with Ray here")
@pytest.mark.parametrize("http", ["127.0.0.1:8000", "*:8000", "*:81"])
def test_wrapper_closes_two_listeners_only(tmp_path: Path, http: str):
    """HAProxy itself (`-c`: check) accepts the rewritten configuration; the front stays open."""
    folder = tmp_path / "h"
    folder.mkdir()
    variables = haproxy.environment(folder)
    assert all("/tmp/haproxy" not in value for value in variables.values())
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout client 5s\n    timeout server 5s\n"
        "    timeout connect 5s\n"
        f"frontend prometheus\n    bind :{variables['RAY_SERVE_HAPROXY_METRICS_PORT']}\n"
        f"frontend http_frontend\n    bind {http}\n"
        f"listen stats\n  bind *:{variables['RAY_SERVE_HAPROXY_STATS_PORT']}\n  stats enable\n"
    )
    command = [variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config), "-c"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    binds = [line.split()[1] for line in config.read_text().splitlines() if "bind" in line]
    assert binds == [f"unix@{folder}/metrics.sock", http, f"unix@{folder}/stats.sock"]


@pytest.mark.skipif(not haproxy.available(), reason="no HAProxy comes with Ray here")
def test_every_path_of_haproxy_is_ours(tmp_path: Path):
    """What Serve would put under /tmp by default is moved; read from Serve's own constants."""
    code = (
        "from ray.serve._private import constants as c\n"
        "print(*(v for n, v in vars(c).items() if 'HAPROXY' in n and str(v).startswith('/')))"
    )
    variables = haproxy.environment(tmp_path)
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    paths = answer.stdout.split()
    assert len(paths) >= 6, answer.stderr
    assert [path for path in paths if not path.startswith(f"{tmp_path}/")] == [str(tmp_path)]
