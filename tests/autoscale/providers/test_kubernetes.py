"""The Kubernetes provider passes the suite over the API server's double, and the suite notices
every broken one."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoscale.providers.provider import Provider
from tests.autoscale.providers.broken import BROKEN, must_be_noticed
from tests.autoscale.providers.kubernetes_site import KubernetesSite
from tests.autoscale.providers.suite import CHECKS, Check, holds


@contextmanager
def kubernetes_site(folder: Path) -> Iterator[KubernetesSite]:
    site = KubernetesSite(folder)
    try:
        yield site
    finally:
        site.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, tmp_path: Path):
    with kubernetes_site(tmp_path) as site:
        asyncio.run(holds(check, site))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_suite_notices(broken: Callable[[Provider], Provider], tmp_path: Path):
    with kubernetes_site(tmp_path) as site:
        asyncio.run(must_be_noticed(broken, site))
