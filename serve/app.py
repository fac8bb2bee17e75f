"""The ingress as a Ray Serve deployment: the HTTP edge over an Ingress, under a chosen proxy.

Serve gives it an HTTP port, health checks and restarts; everything that knows requests is in
http.py and ingress.py. It reserves no CPU: it waits most of the time.
"""

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster.clock import WallClock
from cluster.settings import Settings
from cluster.settings.losses import quality_cost
from serve.access import Traces, configure
from serve.actors import RayDecodeClient, RayPlacing, watch
from serve.backlog import Backlog
from serve.follow import follow
from serve.http import EdgeSettings, build_app
from serve.ingress import Ingress
from serve.keys import KeyRing, load_keys
from serve.placing import placing_routes
from serve.prefixes import placed_prefixes

MAX_ONGOING_REQUESTS = 1000


def model_name(settings: Settings) -> str:
    """The name that clients send: the setting itself, or the last part of a path."""
    return Path(settings.model).name if "/" in settings.model else settings.model


def context_tokens(settings: Settings) -> int:
    """The longest prompt and answer together that every replica's pages can hold."""
    return settings.engine.kv_tokens


def traces(settings: Settings) -> Traces | None:
    """What sends traces to observe.otlp_endpoint; None, and nothing imported, where it is empty."""
    if not settings.observe.otlp_endpoint:
        return None
    from serve.trace import Tracer

    return Tracer(settings.observe.otlp_endpoint, model_name(settings))


class IngressDeployment:
    """One ingress replica; Serve calls `__serve_build_asgi_app__` after the constructor."""

    def __init__(self, settings_json: str, keys_json: str) -> None:
        from cluster.raylocal.private import confine_replica
        from models.load import load_text

        self.settings = Settings.model_validate_json(settings_json)
        if self.settings.ray.address == "local":
            confine_replica()
        configure(self.settings.observe.log_format, self.settings.observe.log_level)
        self.text = load_text(self.settings.model)
        clock = WallClock()
        name = f"ingress-{secrets.token_hex(4)}"
        patience_s = self.settings.controller.start_deadline_s
        limits = self.settings.admission
        self.ingress = Ingress(
            name,
            RayDecodeClient,
            prefixes=placed_prefixes(self.settings),
            backlog=Backlog(limits.max_queued_tokens, limits.max_queued_requests, clock),
            patience_s=patience_s,
            clock=clock,
        )
        self.keys = KeyRing.from_json(keys_json)
        self._follower = asyncio.create_task(follow(watch, self.ingress.update, clock))

    def __serve_build_asgi_app__(self) -> Any:
        edge = EdgeSettings(
            model=model_name(self.settings),
            context_tokens=context_tokens(self.settings),
            max_body_bytes=self.settings.http.max_body_bytes,
            keys=self.keys,
            quality_cost=quality_cost(self.settings),
        )
        app = build_app(self.ingress, self.text, edge, traces=traces(self.settings))
        if key := self.settings.http.machines_key:
            app.router.routes.extend(placing_routes(RayPlacing(), key))
        return app


def application(
    settings: Settings,
    ingress: type[IngressDeployment] = IngressDeployment,
    *,
    replicas: int = 1,
    options: Mapping[str, Any] = MappingProxyType({"num_cpus": 0}),
) -> Any:
    """The bound application for cluster.raylocal.front.start_front. options: what Ray is to give to
    each of the ingresses."""
    from ray import serve as ray_serve

    wrapped = ray_serve.ingress()(ingress)
    deployment = ray_serve.deployment(
        name="ingress",
        num_replicas=replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.http.drain_s,
        ray_actor_options=dict(options),
    )(wrapped)
    # The keys travel, hashed: a file need not be where the ingress runs.
    return deployment.bind(settings.model_dump_json(), load_keys(settings.http).to_json())
