"""A layer over moto's server: answers what moto answers not at all or not as AWS does, checks every
call against a policy, notes it, and makes it fail when it is told to.

What moto lacks: prices, placement scores, capacity and the choice among a fleet's overrides, client
tokens, machines that start, lag of the listing, interruptions.
"""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from werkzeug.test import run_wsgi_app

from tests.aws_double import requests
from tests.aws_double.market import GPU_USD, REGION, Market
from tests.aws_double.policy import Policy, acts
from tests.aws_double.requests import Call, Environ, Reply, element

ORACLE = "oracle"  # signs what the tests ask: neither noted nor refused
LOST = "lost answer"  # a fault: the call takes effect, and the connection breaks
FLEET_ERROR = "InsufficientInstanceCapacity"


class Overlay:
    """WSGI over `inner`. faults: by operation, taken one at a time: a code (with its status, as
    "503 ServiceUnavailable"), or LOST. calls: the actions of all noted requests."""

    def __init__(self, inner: Any, market: Market, policy: Policy | None) -> None:
        self.inner, self.market, self.policy = inner, market, policy
        self.faults: dict[str, list[str]] = {}
        self.calls: list[Call] = []
        self.fleets: dict[str, tuple[str, Reply]] = {}
        self._lock = threading.RLock()

    def __call__(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        call = requests.read(environ)
        with self._lock:
            self.market.tick()
            if call is None or call.key == ORACLE:
                reply = self._moto(environ)
            else:
                reply = self._answered(call)
        reasons = {200: "OK", 400: "Bad Request", 403: "Forbidden", 503: "Service Unavailable"}
        status = f"{reply.status} {reasons.get(reply.status, 'Error')}"
        start(status, [("Content-Type", reply.kind), ("Content-Length", str(len(reply.body)))])
        return [reply.body]

    def _answered(self, call: Call) -> Reply:
        self.calls.append(call)
        due = self.faults.get(call.operation)
        fault = due.pop(0) if due else ""
        if fault and fault != LOST:
            status, _, code = fault.rpartition(" ")
            return requests.error(call, code, int(status or 400))
        tags = {
            one.id: {t["key"]: t["value"] for t in one.get_tags()}
            for one in self.market.instances()
        }
        known = acts(call, tags)
        if self.policy and not all([self.policy.allows(act) for act in known]):
            return requests.error(call, "UnauthorizedOperation", 403)
        reply = self._reply(call)
        if fault == LOST:
            call.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("the answer is lost")
        return reply

    def _reply(self, call: Call) -> Reply:
        own = {
            "ec2:CreateFleet": self._create_fleet,
            "ec2:DescribeInstances": self._describe_instances,
            "ec2:TerminateInstances": self._terminate,
            "ec2:DescribeSpotPriceHistory": self._prices,
            "ec2:GetSpotPlacementScores": self._scores,
            "pricing:GetProducts": self._products,
        }
        found = own.get(call.action)
        return found(call) if found else self._moto(call.environ)

    def _moto(self, environ: Environ) -> Reply:
        body, status, headers = run_wsgi_app(self.inner, environ, buffered=True)
        kind = headers.get("Content-Type", "text/xml")
        return Reply(int(status.split()[0]), b"".join(body), kind)

    def _create_fleet(self, call: Call) -> Reply:
        """The same client token has the same answer, and other arguments under it are refused."""
        token = call.params["ClientToken"]
        asked = json.dumps({k: v for k, v in call.params.items()}, sort_keys=True)
        if token in self.fleets:
            before, reply = self.fleets[token]
            mismatch = requests.error(call, "IdempotentParameterMismatch")
            return reply if before == asked else mismatch
        reply = self._new_fleet(call)
        self.fleets[token] = (asked, reply)
        return reply

    def _new_fleet(self, call: Call) -> Reply:
        prefix = "LaunchTemplateConfigs.1.Overrides"
        kind = call.params["TargetCapacitySpecification.DefaultTargetCapacityType"]
        wanted = [(each["InstanceType"], each["SubnetId"]) for each in call.structures(prefix)]
        zones = {one.id: one.availability_zone for one in self.market.backend.describe_subnets()}
        why = {pool: self._why_not(pool[0], zones[pool[1]], kind) for pool in wanted}
        rooms = [pool for pool in wanted if not why[pool]]
        if not rooms:
            return requests.ec2("CreateFleet", _fleet_errors(call, kind, why))
        name, subnet = min(rooms, key=lambda pool: self._rank(pool[0], zones[pool[1]], kind))
        params = {k: v for k, v in call.params.items() if not k.startswith(prefix)}
        params |= {f"{prefix}.1.InstanceType": name, f"{prefix}.1.SubnetId": subnet}
        reply = self._moto(requests.with_params(call.environ, params))
        for made in set(re.findall(r"i-[0-9a-f]{17}", reply.body.decode())):
            self.market.born(made)
        return reply

    def _why_not(self, name: str, zone: str, kind: str) -> str:
        told = self.market.refuse.get((name, zone, kind), "")
        full = kind == "spot" and not self.market.has_room(zone)
        return told or (FLEET_ERROR if full else "")

    def _rank(self, name: str, zone: str, kind: str) -> tuple[int, float]:
        """price-capacity-optimized: the most room, then the cheapest; on demand the cheapest."""
        if kind != "spot":
            return 0, GPU_USD[name]
        return -self.market.room.get((name, zone), 5), self.market.usd_per_h(name, zone)

    def _describe_instances(self, call: Call) -> Reply:
        """Without the machines that are too young to be listed."""
        held = self.market.backend.reservations
        now_s, lag_s = self.market.wall(), self.market.lag_s
        young = {
            key: held.pop(key)
            for key in list(held)
            if any(now_s - self.market.made.get(i.id, 0) < lag_s for i in held[key].instances)
        }
        try:
            return self._moto(call.environ)
        finally:
            held.update(young)

    def _terminate(self, call: Call) -> Reply:
        hidden = [
            name
            for name in call.listed("InstanceId")
            if self.market.wall() - self.market.made.get(name, 0) < self.market.lag_s
        ]
        if hidden:
            return requests.error(call, "InvalidInstanceID.NotFound")
        before = {one.id for one in self.market.alive()}
        reply = self._moto(call.environ)
        for one in self.market.instances():
            if one.id in before and one.state not in ("pending", "running"):
                self.market.ended(one, "Client.UserInitiatedShutdown")
        return reply

    def _prices(self, call: Call) -> Reply:
        start_s = datetime.fromisoformat(call.params["StartTime"]).timestamp()
        items = ""
        for name in call.listed("InstanceType"):
            for zone in self._zones():
                if name in GPU_USD:
                    items += self._price_items(name, zone, start_s)
        return requests.ec2(
            "DescribeSpotPriceHistory", f"<spotPriceHistorySet>{items}</spotPriceHistorySet>"
        )

    def _price_items(self, name: str, zone: str, start_s: float) -> str:
        """The price that held at the start, and every change since."""
        changes = [at_s for at_s, _ in self.market.spot.get((name, zone), []) if at_s > start_s]
        past = [at_s for at_s, _ in self.market.spot.get((name, zone), []) if at_s <= start_s]
        items = ""
        for at_s in [past[-1] if past else start_s - 3600, *changes]:
            if at_s > self.market.wall():
                continue
            at = datetime.fromtimestamp(at_s, UTC).isoformat()
            price = self.market.usd_per_h(name, zone, at_s)
            fields = element("instanceType", name) + element("availabilityZone", zone)
            fields += element("productDescription", "Linux/UNIX") + element("timestamp", at)
            items += f"<item>{fields}{element('spotPrice', price)}</item>"
        return items

    def _scores(self, call: Call) -> Reply:
        items = ""
        for zone, zone_id in self._zones().items():
            score = element("score", self.market.scores.get(zone, 5))
            place = element("region", REGION) + element("availabilityZoneId", zone_id)
            items += f"<item>{place}{score}</item>"
        return requests.ec2(
            "GetSpotPlacementScores", f"<spotPlacementScoreSet>{items}</spotPlacementScoreSet>"
        )

    def _products(self, call: Call) -> Reply:
        wanted = {each["Field"]: each["Value"] for each in call.params["Filters"]}
        usd = GPU_USD.get(wanted["instanceType"])
        dimension = {"unit": "Hrs", "pricePerUnit": {"USD": f"{usd}"}}
        product = {"terms": {"OnDemand": {"a": {"priceDimensions": {"b": dimension}}}}}
        found = [json.dumps(product)] if usd else []
        return Reply(200, json.dumps({"PriceList": found}).encode(), "application/x-amz-json-1.1")

    def _zones(self) -> dict[str, str]:
        """Name -> id."""
        subnets = self.market.backend.describe_subnets()
        return {one.availability_zone: one.availability_zone_id for one in subnets}


def _fleet_errors(call: Call, kind: str, why: dict[tuple[str, str], str]) -> str:
    """An instant fleet that made nothing, pool by pool."""
    items = ""
    for (name, subnet), code in why.items():
        override = element("instanceType", name) + element("subnetId", subnet)
        place = f"<overrides>{override}</overrides>"
        place = f"<launchTemplateAndOverrides>{place}</launchTemplateAndOverrides>"
        told = element("errorCode", code) + element("errorMessage", f"{name}: {code}")
        items += f"<item>{place}{element('lifecycle', kind)}{told}</item>"
    return f"<fleetId>fleet-none</fleetId><errorSet>{items}</errorSet><fleetInstanceSet/>"
