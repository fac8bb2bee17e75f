"""From settings to a provider, as the controller makes it."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoscale.catalog.kinds import read_kinds
from autoscale.providers.aws.books import Books
from autoscale.providers.aws.calls import Calls, boto_clients
from autoscale.providers.aws.fleet import Template
from autoscale.providers.aws.notices import NOTICE_S, Queue
from autoscale.providers.aws.provider import AwsProvider
from autoscale.providers.aws.sale import Sale
from cluster.clock import Clock
from cluster.settings import Settings


def from_settings(
    settings: Settings,
    clock: Clock,
    *,
    folder: Path | None = None,
    wall: Callable[[], float] = time.time,
    draw: random.Random | None = None,
    clients: Callable[[str], Any] | None = None,
    notice_s: float = NOTICE_S,
) -> AwsProvider:
    """folder: of what happened, by default data_dir/aws; it may be lost, but then only old cursors
    with it. wall: the calendar. draw: of the waits. clients: boto3's by default. notice_s: from an
    interruption's event until the machine goes. ValueError names the setting that is missing."""
    aws = settings.autoscale.aws
    if not aws.launch_template:
        raise ValueError(
            "autoscale.aws.launch_template is empty; the id (lt-...) or name of a launch template "
            "is accepted"
        )
    make = clients or boto_clients(aws.region)
    calls = Calls(make, clock, draw or random.Random())
    region = aws.region or make("ec2").meta.region_name
    offset_s = round(clock.now_s() - wall(), 3)
    books = Books(folder or Path(settings.data_dir) / "aws", offset_s)
    return AwsProvider(
        calls,
        Sale(calls, aws, region, read_kinds(), wall),
        Queue(calls, aws.queue_url, notice_s),
        books,
        Template(aws.launch_template, aws.template_version),
        clock,
        wall,
    )
