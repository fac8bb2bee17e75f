"""The AWS provider passes the suite over moto's server under our overlay, held to the documented
IAM policy, and the suite notices every broken one."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from autoscale.providers.provider import Provider
from tests.autoscale.providers.broken import BROKEN, must_be_noticed
from tests.autoscale.providers.suite import CHECKS, Check
from tests.aws_double.cloud import AwsCloud
from tests.aws_double.site import AwsSite


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, aws_cloud: AwsCloud, tmp_path: Path):
    async def run() -> None:
        await check(await AwsSite(aws_cloud, tmp_path).begin())

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_suite_notices(broken: Callable[[Provider], Provider], aws_cloud: AwsCloud, tmp_path: Path):
    async def run() -> None:
        await must_be_noticed(broken, await AwsSite(aws_cloud, tmp_path).begin())

    asyncio.run(run())
