"""The instance metadata service, version 2: what a machine is told of itself.

"Use IMDSv2" and "Spot Instance interruption notices" of the EC2 user guide: a session token that is
asked for with its lifetime and sent with every question; 404 where there is nothing to say.
"""

import json
import logging
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from autoscale.providers.aws import marks
from autoscale.providers.aws.calls import Backoff
from autoscale.providers.aws.notices import Notice
from cluster.clock import Clock

LOG = logging.getLogger(__name__)
ADDRESS = "http://169.254.169.254"
ADDRESS_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # as AWS's own SDKs read it
TOKEN_S, RENEW_S = 21_600, 60.0  # the longest lifetime, and how early a token is renewed
DEADLINE_S = 2.0
WATCH_S = 5.0  # AWS recommends to look every five seconds
PATIENCE = Backoff(first_s=1.0, most_s=30.0)


class ImdsError(Exception):
    """The service did not answer, or not as it should."""


class Imds:
    """One machine's. client: without redirects and proxies."""

    def __init__(self, client: httpx.AsyncClient, clock: Clock, *, token_s: int = TOKEN_S) -> None:
        self.client, self.clock, self.token_s = client, clock, token_s
        self._token, self._until_s = "", 0.0

    async def get(self, path: str) -> str | None:
        """What /latest/meta-data/PATH says; None where there is nothing. ImdsError."""
        answer = await self._ask(path)
        if answer.status_code == 401:  # the token has ended before its time
            self._token = ""
            answer = await self._ask(path)
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            raise ImdsError(f"{path}: {answer.status_code}")
        return answer.text

    async def notices(self) -> list[Notice]:
        """What the machine is told of its end, as it stands. ImdsError."""
        instance = await self.get("instance-id")
        told = [
            ("interruption", await self.get("spot/instance-action"), "time"),
            ("rebalance", await self.get("events/recommendations/rebalance"), "noticeTime"),
        ]
        found = []
        for kind, text, field in told:
            if text is not None and instance:
                found.append(Notice(instance, kind, _time(text, field)))  # type: ignore[arg-type]
        return found

    async def _ask(self, path: str) -> httpx.Response:
        now_s = self.clock.now_s()
        if not self._token or now_s >= self._until_s - min(RENEW_S, self.token_s / 2):
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(self.token_s)}
            answer = await self._request("PUT", "/latest/api/token", lifetime)
            if answer.status_code != 200:
                raise ImdsError(f"no token: {answer.status_code}")
            self._token, self._until_s = answer.text, now_s + self.token_s
        token = {"X-aws-ec2-metadata-token": self._token}
        return await self._request("GET", f"/latest/meta-data/{path}", token)

    async def _request(self, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
        try:
            return await self.client.request(method, path, headers=headers)
        except httpx.HTTPError as error:
            raise ImdsError(f"{path}: {error or type(error).__name__}") from error


def client() -> httpx.AsyncClient:
    """Where AWS's own SDKs look for the service."""
    address = os.environ.get(ADDRESS_VARIABLE) or ADDRESS
    return httpx.AsyncClient(base_url=address, timeout=DEADLINE_S, trust_env=False)


async def watch(
    imds: Imds,
    tell: Callable[[Notice], Awaitable[Any]],
    clock: Clock,
    draw: random.Random,
    *,
    every_s: float = WATCH_S,
) -> None:
    """Tell each notice once, for ever. What fails is tried again, after longer and longer waits."""
    told: set[Notice] = set()
    failed = 0
    while True:
        try:
            for notice in await imds.notices():
                if notice not in told:
                    await tell(notice)
                    told.add(notice)
            failed = 0
        except Exception as error:  # of the service or of whoever is told
            failed += 1
            LOG.warning("instance metadata: %s", error or type(error).__name__)
        wait_s = PATIENCE.wait_s(min(failed, 16), draw) if failed else every_s
        await clock.sleep(max(wait_s, 0.05))


def _time(text: str, field: str) -> float:
    try:
        return marks.read(json.loads(text)[field])
    except (ValueError, KeyError, TypeError) as error:
        raise ImdsError(f"no {field} in {text[:200]!r}") from error
