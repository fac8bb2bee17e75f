"""Calls of AWS's API: each in a thread of its own, throttling waited out with full jitter.

Waiting: a uniform share of a doubling bound, as in M. Brooker, "Exponential Backoff and Jitter"
(AWS Architecture Blog, 2015). botocore's own retries are off, so that nothing is waited for twice.
"""

import asyncio
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from autoscale.providers.aws.errors import may_pass, refuses
from cluster.clock import Clock

CONNECT_S, READ_S = 3.0, 8.0
PRICING_REGION = "us-east-1"  # one of the three that answer for all regions


@dataclass(frozen=True)
class Backoff:
    """How often a call is made, and the bounds of the waits between."""

    attempts: int = 4
    first_s: float = 0.5
    most_s: float = 8.0

    def wait_s(self, failed: int, draw: random.Random) -> float:
        """After so many failures (from 1): uniform between 0 and a bound that doubles."""
        return draw.uniform(0.0, min(self.most_s, self.first_s * 2.0 ** (failed - 1)))


@dataclass
class Calls:
    """make: a client by the service's name ("ec2", "sqs", "pricing"), as boto3's."""

    make: Callable[[str], Any]
    clock: Clock
    draw: random.Random
    backoff: Backoff = Backoff()
    _clients: dict[str, Any] = field(default_factory=dict)
    _making: threading.Lock = field(default_factory=threading.Lock)

    async def one(self, service: str, operation: str, **request: Any) -> dict[str, Any]:
        """The answer. Made again while the error may pass; then it is raised: the first of those
        whose effect is unknown, if there is one."""
        doubt: Exception | None = None
        for failed in range(1, self.backoff.attempts + 1):
            try:
                return await self._in_thread(service, operation, request)
            except Exception as error:
                if not refuses(error):
                    doubt = doubt or error
                if failed == self.backoff.attempts or not may_pass(error):
                    raise (doubt or error) from None
            await self.clock.sleep(self.backoff.wait_s(failed, self.draw))
        raise AssertionError("a call is made at least once")

    async def every(self, service: str, operation: str, key: str, **request: Any) -> list[Any]:
        """The entries under `key` of all pages."""
        found: list[Any] = []
        while True:
            page = await self.one(service, operation, **request)
            found += page.get(key, ())
            if not page.get("NextToken"):
                return found
            request["NextToken"] = page["NextToken"]

    async def _in_thread(
        self, service: str, operation: str, request: dict[str, Any]
    ) -> dict[str, Any]:
        return await asyncio.to_thread(self._call, service, operation, request)

    def _call(self, service: str, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        with self._making:
            if service not in self._clients:
                self._clients[service] = self.make(service)
        answer: dict[str, Any] = getattr(self._clients[service], operation)(**request)
        return answer


def boto_clients(region: str) -> Callable[[str], Any]:
    """Clients of boto3 with credentials as it finds them. region: "" as it finds that, too.
    ValueError without boto3, or without a region."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ValueError("machines from AWS need boto3: pip install sanderling[aws]") from None
    session = boto3.Session(region_name=region or None)
    if not session.region_name:
        raise ValueError(
            "autoscale.aws.region is empty and boto3 finds none; a region like us-east-1 is "
            "accepted, or AWS_DEFAULT_REGION"
        )
    config = Config(
        connect_timeout=CONNECT_S, read_timeout=READ_S, retries={"total_max_attempts": 1}
    )

    def make(service: str) -> Any:
        where = PRICING_REGION if service == "pricing" else session.region_name
        return session.client(service, region_name=where, config=config)

    return make
