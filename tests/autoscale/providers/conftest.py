"""One server of the AWS double for all tests beside this file."""

from collections.abc import Iterator

import pytest

from tests.aws_double.cloud import AwsCloud, cloud


@pytest.fixture(scope="session")
def aws_cloud() -> Iterator[AwsCloud]:
    with cloud() as running:
        yield running
