"""An account of AWS for tests: moto's server under our overlay, a queue and a rule as the docs have
them, a launch template, and clients for whoever is tested and for whoever checks.

Not in it: real capacity, networks, images, the time that EC2 takes, IAM beyond policy.py.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3
from botocore.config import Config
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.events.models import events_backends
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.sqs.models import sqs_backends
from werkzeug.serving import make_server

from tests.aws_double.market import REGION, Market
from tests.aws_double.overlay import ORACLE, Overlay
from tests.aws_double.policy import Policy

DOCS = Path(__file__).parents[2] / "docs" / "aws.md"
IMAGE = "ami-12c6146b"  # one that moto knows
QUEUE = "sanderling-notices"
TESTED = "tested"


def documented(name: str) -> Any:
    """The JSON that follows `<!-- NAME -->` in docs/aws.md."""
    text = DOCS.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\s*```json\n(.*?)```", text, re.DOTALL)
    assert found, f"docs/aws.md has no {name}"
    return json.loads(found[1])


class AwsCloud:
    """One account, begun anew by `begin`. url: its endpoint for all services."""

    def __init__(self) -> None:
        self.overlay = Overlay(DomainDispatcherApplication(create_backend_app), Market(float), None)
        server = make_server(
            "127.0.0.1", 0, self.overlay, threaded=True, request_handler=MotoRequestHandler
        )
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._server, self.url = server, f"http://127.0.0.1:{server.server_address[1]}"
        self._thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self._clients: dict[tuple[str, str], Any] = {}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def begin(self, wall: Callable[[], float], *, policy: bool = True) -> Market:
        """An empty account. policy: the documented one is held."""
        with patch.dict(os.environ, {"MOTO_EC2_LOAD_DEFAULT_AMIS": "false"}):  # 1300, a quarter s
            for backends in (ec2_backends, sqs_backends, events_backends):
                backends[DEFAULT_ACCOUNT_ID][REGION].reset()
        market = Market(wall)
        self.overlay.market, self.overlay.policy = market, None
        self.overlay.faults, self.overlay.calls, self.overlay.fleets = {}, [], {}
        if policy:
            self.overlay.policy = Policy(documented("controller policy"))
        ec2, sqs, events = (self.client(name, ORACLE) for name in ("ec2", "sqs", "events"))
        ec2.create_launch_template(
            LaunchTemplateName="sanderling", LaunchTemplateData={"ImageId": IMAGE}
        )
        attributes = {"VisibilityTimeout": "0"}  # what is not deleted comes again at once
        self.queue_url = sqs.create_queue(QueueName=QUEUE, Attributes=attributes)["QueueUrl"]
        arn = f"arn:aws:sqs:{REGION}:{DEFAULT_ACCOUNT_ID}:{QUEUE}"
        events.put_rule(Name="notices", EventPattern=json.dumps(documented("event pattern")))
        events.put_targets(Rule="notices", Targets=[{"Id": "queue", "Arn": arn}])
        return market

    def client(self, service: str, key: str = TESTED) -> Any:
        if (service, key) not in self._clients:
            self._clients[service, key] = boto3.client(
                service,
                region_name=REGION,
                endpoint_url=self.url,
                aws_access_key_id=key,
                aws_secret_access_key="secret",
                config=Config(retries={"total_max_attempts": 1}, read_timeout=240),
            )
        return self._clients[service, key]

    @property
    def market(self) -> Market:
        return self.overlay.market

    @property
    def faults(self) -> dict[str, list[str]]:
        return self.overlay.faults

    def made(self, operation: str) -> int:
        """How often the one under test has called it."""
        return sum(call.operation == operation for call in self.overlay.calls)

    def described(self) -> list[dict[str, Any]]:
        """All instances by DescribeInstances, whoever they belong to."""
        pages = self.client("ec2", ORACLE).get_paginator("describe_instances").paginate()
        return [one for page in pages for held in page["Reservations"] for one in held["Instances"]]

    def alive(self) -> set[str]:
        """Ids of what is paid for: the oracle."""
        paid = ("pending", "running", "stopping", "stopped")
        return {one["InstanceId"] for one in self.described() if one["State"]["Name"] in paid}

    def waiting(self) -> int:
        """Messages in the queue."""
        sqs = self.client("sqs", ORACLE)
        name = "ApproximateNumberOfMessages"
        told = sqs.get_queue_attributes(QueueUrl=self.queue_url, AttributeNames=[name])
        return int(told["Attributes"][name])

    def send(self, body: str) -> None:
        """Into the queue, past EventBridge."""
        self.client("sqs", ORACLE).send_message(QueueUrl=self.queue_url, MessageBody=body)


@contextmanager
def cloud() -> Iterator[AwsCloud]:
    """A server, and its end."""
    running = AwsCloud()
    try:
        yield running
    finally:
        running.close()
