"""The command `autoscale`: the control loop over the provider and the service that the settings
name, until SIGTERM. The chart's Deployment runs exactly this. Imported by the CLI."""

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.options import Resolved, with_settings
from cluster.registry import Registry
from cluster.settings import Settings

if TYPE_CHECKING:
    from autoscale.catalog.offer import Offer
    from autoscale.loop.record import Head
    from autoscale.providers.controller import Controller, Leading
    from autoscale.providers.provider import Provider
    from cluster.clock import Clock

# Each: (settings, clock) -> Rented.
PROVIDERS = Registry(
    "provider",
    {
        "kubernetes": "autoscale.providers.controller_command:kubernetes",
        "aws": "autoscale.providers.controller_command:aws",
    },
)


@dataclass
class Rented:
    """Everything of a provider that the controller needs. place_of: what the service calls a
    machine. watch: begins to call its argument when something happened; returns what ends it."""

    provider: "Provider"
    election: "Leading"
    place_of: Callable[[str], str] = lambda machine: machine
    watch: Callable[[Callable[[], None]], Callable[[], None]] = field(default=lambda _: _nothing)


@click.command()
@with_settings(dry_run=True)
def autoscale(resolved: Resolved) -> None:
    """Run the control loop: rent machines, place replicas, drain, give back; until SIGTERM."""
    from cluster.clock import WallClock

    settings = resolved.settings
    if settings.autoscale.provider == "none":
        raise ValueError(
            "autoscale.provider = 'none' rents from nobody; "
            f"{' or '.join(PROVIDERS.names())} is accepted"
        )
    logging.basicConfig(
        level=settings.observe.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    asyncio.run(serve(settings, WallClock()))


async def serve(settings: Settings, clock: "Clock", stop: asyncio.Event | None = None) -> None:
    """Until `stop` is set, or SIGTERM or SIGINT comes."""
    from autoscale.providers.health import Health

    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    rented = PROVIDERS.load(settings.autoscale.provider)(settings, clock)
    async with AsyncExitStack() as stack:
        controller = await connected(settings, rented, clock, stack)
        if settings.autoscale.health_port:
            health = Health(controller, settings.autoscale.health_port)
            health.start()
            stack.callback(health.close)
        wake = lambda: loop.call_soon_threadsafe(controller.woken.set)  # noqa: E731
        stack.callback(rented.watch(wake))
        await controller.run(stop)


async def connected(
    settings: Settings, rented: Rented, clock: "Clock", stack: AsyncExitStack
) -> "Controller":
    """The controller over a service at autoscale.service_url; its connection ends with `stack`."""
    import httpx

    from autoscale.loop.record import make_loop
    from autoscale.providers.controller import Controller
    from autoscale.providers.remote import Remote

    chosen = settings.autoscale
    timeout = httpx.Timeout(chosen.call_deadline_s, connect=3.0)
    base = chosen.service_url.rstrip("/")
    client = await stack.enter_async_context(httpx.AsyncClient(base_url=base, timeout=timeout))
    remote = Remote(client, service_key(settings), chosen.drain_s, clock, rented.place_of)
    offers = tuple(await rented.provider.offers()) if chosen.policy != "on_demand" else ()
    head = learnt(settings, offers, clock.now_s())
    controller = Controller(
        rented.provider,
        remote,
        rented.election,
        lambda name: make_loop(head(name)),
        chosen,
        clock,
    )
    remote.machines = lambda: [machine.id for machine in controller.provider.known]
    return controller


def learnt(
    settings: Settings, offers: "tuple[Offer, ...]", now_s: float
) -> Callable[[str], "Head"]:
    """What a loop of a given name is made of. ValueError where the policy lacks what it needs."""
    from autoscale.loop.record import head_of, make_loop

    chosen = settings.autoscale
    spot = tuple(offer for offer in offers if offer.market == "spot")
    pools, chain = tuple(offer.name for offer in spot), None
    if chosen.policy == "mixed":
        chain = _fitted(settings, spot)

    def head(name: str) -> "Head":
        return head_of(chosen, name, start_s=now_s, pools=pools, chain=chain)

    make_loop(head("tried"))  # what is wrong is said now, not in the middle of a step
    return head


def _fitted(settings: Settings, spot: "tuple[Offer, ...]") -> Any:
    """What the recorded market says of the zones that the spot offers are in."""
    from autoscale.simulate.market import read_market
    from autoscale.spot.levels import fit, levels_for

    chosen = settings.autoscale
    cap = chosen.decode.cap + chosen.prefill.cap
    market = read_market(
        Path(chosen.history),
        spot_usd_per_h=0.0,
        on_demand_usd_per_h=0.0,
        startup_s=0.0,
        depth=cap,
    )
    zones = [offer.name for offer in market.spot]
    missing = sorted({offer.zone for offer in spot} - set(zones))
    if missing or not spot:
        raise ValueError(
            f"autoscale.history = {chosen.history!r} knows the zones {', '.join(zones)}, and spot "
            f"offers are in {', '.join(missing) or 'none'}; offers in those zones are accepted, or "
            "another autoscale.policy"
        )
    history = market.capacity[:, [zones.index(offer.zone) for offer in spot]]
    levels = levels_for(cap, max(1, int(history.max())))
    names, regions = [o.name for o in spot], [o.region for o in spot]
    return fit(history, tuple(names), tuple(regions), levels, market.period_s)


def service_key(settings: Settings) -> str:
    """Of POST /machines. ValueError where its file cannot be read."""
    name = settings.autoscale.service_key_file
    if not name:
        return ""
    try:
        return Path(name).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(
            f"autoscale.service_key_file = {name!r} cannot be read ({error.strerror}); a file with "
            "the key that http.machines_key holds is accepted"
        ) from None


def kubernetes(settings: Settings, clock: "Clock") -> Rented:
    """Worker pods, and a Lease for who leads."""
    from autoscale.providers.kubernetes.api import connect, own_name
    from autoscale.providers.kubernetes.lease import Election
    from autoscale.providers.kubernetes.provider import KubernetesProvider
    from autoscale.providers.kubernetes.watch import Watch

    chosen = settings.autoscale.kubernetes
    api = connect(chosen)
    provider = KubernetesProvider(api, chosen, clock)
    me = f"{own_name()}-{secrets.token_hex(4)}"
    election = Election(connect(chosen), chosen.lease, me, chosen.lease_s, clock, time.time)

    def watch(wake: Callable[[], None]) -> Callable[[], None]:
        workers = Watch(connect(chosen), "pods", wake, selector="ray.io/node-type=worker")
        watches = [Watch(connect(chosen), "nodes", wake), workers]
        for each in watches:
            each.start()

        def close() -> None:
            for each in watches:
                each.close()

        return close

    return Rented(provider, election, lambda machine: provider.pods.get(machine, ""), watch)


def aws(settings: Settings, clock: "Clock") -> Rented:
    """Instances; one controller, for nothing says who leads."""
    from autoscale.providers.controller import Alone
    from cluster.registry import load

    made = load("autoscale.providers.aws.build:from_settings")(settings, clock)
    return Rented(made, Alone(f"aws-{secrets.token_hex(4)}"))


def _nothing() -> None:
    pass
