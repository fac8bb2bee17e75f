"""/healthz and /metrics of the controller."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from autoscale.providers.controller import Controller

PATIENCE = 5  # periods without a sign of life before /healthz says no
LEAST_S = 60.0


class Health:
    """A server of its own thread. now_s: of the controller's clock."""

    def __init__(self, controller: Controller, port: int, host: str = "") -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Numbers(controller))
        handler = type("Handler", (_Handler,), {"health": self})
        self._server = ThreadingHTTPServer((host, port), handler)
        self._server.daemon_threads = True
        self._controller = controller
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def well(self) -> bool:
        """Whether the controller has lately done anything; one that follows is well, too."""
        controller = self._controller
        silent_s = controller.clock.now_s() - controller.progress.looked_s
        return silent_s < max(LEAST_S, PATIENCE * controller.settings.period_s)


class _Handler(BaseHTTPRequestHandler):
    health: Health

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        answers: dict[str, Callable[[], tuple[int, bytes]]] = {
            "/healthz": self._healthz,
            "/metrics": lambda: (200, generate_latest(self.health.registry)),
        }
        known = answers.get(self.path.partition("?")[0])
        code, text = known() if known else (404, b"/healthz and /metrics are there\n")
        self.send_response(code)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _healthz(self) -> tuple[int, bytes]:
        well = self.health.well()
        return (200, b"ok\n") if well else (503, b"the control loop has stopped moving\n")


class _Numbers(Collector):
    """The controller's, as they are when they are asked for."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def collect(self) -> Iterator[Metric]:
        controller, progress = self._controller, self._controller.progress
        leads = float(controller.election.leads())
        yield GaugeMetricFamily("sanderling_autoscale_leader", "1 where this one decides.", leads)
        text = "Steps of the control loop."
        yield CounterMetricFamily("sanderling_autoscale_steps", text, progress.steps)
        text = "Steps in which the machines could not be listed."
        yield CounterMetricFamily("sanderling_autoscale_undecided", text, progress.undecided)
        machines = GaugeMetricFamily(
            "sanderling_autoscale_machines", "Machines held.", labels=["offer", "state"]
        )
        counts: dict[tuple[str, str], int] = {}
        for machine in controller.provider.known:
            if machine.state != "gone":
                key = (machine.offer, machine.state)
                counts[key] = counts.get(key, 0) + 1
        for key, many in sorted(counts.items()):
            machines.add_metric(key, many)
        yield machines
        actions = CounterMetricFamily(
            "sanderling_autoscale_actions", "What was decided.", labels=["act"]
        )
        for act, many in sorted(progress.actions.items()):
            actions.add_metric([act], many)
        yield actions
