"""`up`, `down` and `status` around runs that went wrong; no Ray is started here."""

import secrets
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from cluster.settings import Settings
from serve import commands
from serve.directory import Directory, Entry
from serve.kv import shared
from serve.runfiles import RunFiles
from serve.scale_command import parse as parse_scale
from serve.scale_command import settled

LEAVE_A_SEGMENT = """
import os, sys
from serve.kv import shared
me = os.getpid()
header = shared.Header(me, shared.process_start(me), "float32", 1, 1, 1, 1, 1, 8192)
shared.create(sys.argv[1], header)
"""


def run(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def killed_run(data_dir: Path) -> tuple[RunFiles, Path]:
    """A run whose processes have died without a word, and the shared memory they left."""
    files = RunFiles(data_dir)
    run_id = f"test{secrets.token_hex(4)}"
    files.begin(Settings(data_dir=str(data_dir)), run_id)
    with subprocess.Popen(["sleep", "60"]) as process:
        files.started(process.pid)
        process.kill()
    name = f"sanderling-{run_id}-prefill-1"
    subprocess.run([sys.executable, "-c", LEAVE_A_SEGMENT, name], check=True)
    return files, shared.SHARED_DIRECTORY / name


def test_up_clears_what_a_killed_run_left(tmp_path: Path):
    """The next run has another id, so nobody would find the old one's memory later."""
    files, segment = killed_run(tmp_path)
    assert segment.exists() and files.host_pid() is None
    refused = run(
        commands.up, "--model", str(tmp_path / "none.gguf"), "--set", f"data_dir={tmp_path}"
    )
    assert isinstance(refused.exception, ValueError), refused.output
    assert "does not exist" in str(refused.exception)
    assert not segment.exists()


def test_down_clears_what_a_killed_run_left(tmp_path: Path):
    files, segment = killed_run(tmp_path)
    said = run(commands.down, "--set", f"data_dir={tmp_path}").output
    assert "nothing was running; ended 0 processes and 1 shared segments" in said
    assert not segment.exists() and not files.begun
    assert run(commands.down, "--set", f"data_dir={tmp_path}").output == "nothing was running\n"


def test_up_that_is_interrupted_stops_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started = []

    def start(files: RunFiles, settings: Settings) -> "subprocess.Popen[bytes]":
        files.begin(settings, "testinterrupted")
        started.append(subprocess.Popen(["sleep", "60"]))
        files.started(started[0].pid)
        return started[0]

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_start_host", start)
    monkeypatch.setattr(commands, "_wait_until_ready", interrupted)
    monkeypatch.setattr("models.resolve.resolve", Path)
    monkeypatch.setattr(commands, "refuse_taken_port", lambda settings: None)
    said = run(commands.up, "--set", f"data_dir={tmp_path}")
    assert said.exit_code == 1 and "Aborted" in said.output
    assert started[0].wait(5) == -15
    assert not RunFiles(tmp_path).begun


def test_status_of_a_service_that_does_not_answer(tmp_path: Path):
    files = RunFiles(tmp_path)
    assert "no service runs" in str(run(commands.status, "--set", f"data_dir={tmp_path}").exception)
    with subprocess.Popen(["sleep", "60"]) as process:
        files.begin(Settings(), "testsilent")
        files.started(process.pid)
        files.say("serving", "http://127.0.0.1:1")
        said = run(commands.status, "--set", f"data_dir={tmp_path}")
        assert said.exit_code == 1 and "does not answer as it should" in said.output
        process.kill()


@pytest.mark.parametrize("word", ["decode", "decode=0", "decode=x", "train=1", "prefill=-1", "=2"])
def test_scale_refuses_what_it_does_not_know(word):
    with pytest.raises(ValueError, match="is not accepted; decode=N takes 1 to"):
        parse_scale(word)


def test_scale_knows_roles_and_when_it_is_done():
    assert dict(map(parse_scale, ["decode=2", "prefill=0"])) == {"decode": 2, "prefill": 0}
    entries = (Entry("decode-1", "decode", "ready"), Entry("decode-2", "decode", "starting"))
    assert not settled(Directory(1, entries), {"decode": 2})
    assert not settled(Directory(1, entries), {"decode": 1})
    assert settled(Directory(1, entries[:1]), {"decode": 1, "prefill": 0})
