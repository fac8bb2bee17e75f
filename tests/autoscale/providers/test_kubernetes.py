"""The Kubernetes provider passes the suite over the API server's double, and the suite notices
every broken one."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoscale.providers.provider import LaunchRefused, Provider
from tests.autoscale.providers.broken import BROKEN
from tests.autoscale.providers.kubernetes_site import KubernetesSite
from tests.autoscale.providers.suite import CHECKS, Check, Site


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
        asyncio.run(_run(check, site))


async def _run(check: Check, site: Site) -> None:
    await check(site)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_suite_notices(broken: Callable[[Provider], Provider], tmp_path: Path):
    noticed = (AssertionError, KeyError, LaunchRefused, pytest.fail.Exception)
    with kubernetes_site(tmp_path) as site, pytest.raises(noticed):
        site.wrap = broken
        site.provider = broken(site.provider)
        asyncio.run(_run(BROKEN[broken], site))
