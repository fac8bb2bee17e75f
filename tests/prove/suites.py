"""Proof rows that are suites of their own: each runs some test files and says how many passed.

A skipped test counts as missed: the proof runs where nothing may be skipped.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.prove.attempt import attempt
from tests.prove.row import Row

ROOT = Path(__file__).parents[2]


class Suite(NamedTuple):
    """What the tests show, and where they are; slow: those that take minutes, too."""

    shows: str
    files: tuple[str, ...]
    slow: bool = False


SUITES = (
    Suite("json_schema answers validate, 200 random schemas", ("tests/grammar",)),
    Suite(
        "streamed = whole for any cut, tools and JSON too",
        ("tests/edge/test_stream.py", "tests/edge/test_tools.py", "tests/edge/test_choices.py"),
    ),
    Suite(
        "seeds and logprobs through batches, hand-offs and kills",
        ("tests/serving/test_parameters.py", "tests/serving/test_disaggregation.py"),
    ),
    Suite("a starved low priority is bounded; preemption", ("tests/engine/test_priority.py",)),
    Suite(
        "wrong bodies: a 4xx with a sentence",
        ("tests/edge/test_requests.py", "tests/edge/test_http.py"),
    ),
    Suite(
        "fuzzed GGUF, safetensors and TOML crash nothing",
        (
            *("tests/models/test_gguf_hostile.py", "tests/models/test_safetensors_hostile.py"),
            *("tests/models/test_folder.py", "tests/cluster/test_settings.py"),
        ),
    ),
    Suite(
        "keys, queue cap, fair turns", ("tests/edge/test_keys.py", "tests/serving/test_backlog.py")
    ),
    Suite(
        "one live service: kills, hang, scale, drain, down",
        ("tests/live/test_service.py",),
    ),
    Suite(
        "the page in headless Chromium, light and dark, wide and phone",
        ("tests/live/test_page.py",),
    ),
)


def rows() -> Iterator[Row]:
    """One row for each suite, as it ends."""
    for suite in SUITES:
        yield from attempt(suite.shows, lambda suite=suite: run(suite))  # type: ignore[misc]


def run(suite: Suite) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *suite.files]
        if suite.slow:
            command += ["-m", "slow or not slow"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        [found] = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {
        name: int(found.get(name) or 0) for name in ("tests", "failures", "errors", "skipped")
    }
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    measured = f"{passed} of {counts['tests']} passed"
    if counts["skipped"]:
        measured += f", {counts['skipped']} skipped"
    if done.returncode:
        measured += f": {_failed(found) or done.stdout.strip().splitlines()[-1]}"
    ok = done.returncode == 0 and 0 < passed == counts["tests"]
    return Row(suite.shows, "all pass", measured, ok)


def _failed(found: ElementTree.Element) -> str:
    """Each test that failed, with the first line of why."""
    said = []
    for case in found.iter("testcase"):
        for fault in (*case.findall("failure"), *case.findall("error")):
            why = (fault.get("message") or "").strip().splitlines()
            said.append(f"{case.get('name')} ({(why or ['no reason'])[0][:120]})")
    return "; ".join(said)
