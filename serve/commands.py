"""The commands `up`, `down` and `status`: what a person at a terminal does with a service.

`up` starts a background process (serve.host) and returns when the service has answered; the others
talk to it over HTTP or by its files. Imported by the CLI when one of them is called.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console

from cluster.options import Resolved, with_settings
from cluster.raylocal.front import is_loopback, refuse_taken_port
from cluster.settings import Settings
from cluster.settings.losses import quality_cost
from serve.keys import load_keys
from serve.runfiles import RunFiles, own_python_path, tail
from serve.view import status_tables

UP_S = 300.0
DOWN_S = 60.0  # beyond http.drain_s
KEY = click.option("--key", envvar="OPENAI_API_KEY", help="API key to ask with ($OPENAI_API_KEY).")


@click.command()
@click.option("--ask", default=None, help="Also ask this and print the answer.")
@KEY
@with_settings("model", "host", "port", dry_run=True)
def up(resolved: Resolved, ask: str | None, key: str | None) -> None:
    """Start serving; returns when a token can be made."""
    settings, console = resolved.settings, Console()
    files = RunFiles(Path(settings.data_dir))
    if files.host_pid() is not None:
        raise ValueError(
            f"a service with data_dir = {settings.data_dir} runs already (process "
            f"{files.host_pid()}); `sanderling status` shows it, `sanderling down` stops it"
        )
    if files.begun:
        _sweep(files)  # a run that was killed: its processes, its shared memory, its port
    if settings.ray.address == "local":
        refuse_taken_port(settings)
    from models.resolve import resolve as find_model

    find_model(settings.model)  # refused here, before anything is started
    keys = load_keys(settings.http)
    if keys.entries and ask and not key:
        raise ValueError("--ask needs an API key here: give --key, or set OPENAI_API_KEY")
    started_s = time.monotonic()
    process = _start_host(files, settings)
    try:
        url = _wait_until_ready(console, files, process)
    except BaseException:  # Ctrl-C as well: what nobody waits for must not go on starting
        _stop(files)
        raise
    console.print(f"Serving {settings.model} at {url}/v1 after {_since(started_s)}", style="bold")
    if cost := quality_cost(settings):
        console.print(cost, style="yellow", markup=False, highlight=False)
    if not keys.entries and not is_loopback(settings.http.host):
        text = "Anybody who reaches this address may use it: no API key is set"
        console.print(f"{text} (http.api_key, http.api_keys_file).", style="yellow")
    if ask:
        _answer(console, url, ask, key)


@click.command()
@with_settings()
def down(resolved: Resolved) -> None:
    """Stop what `up` started; says so when nothing ran."""
    click.echo(_stop(RunFiles(Path(resolved.settings.data_dir))))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the raw status.")
@with_settings()
def status(resolved: Resolved, as_json: bool) -> None:
    """Replicas, queues and KV pages of the running service."""
    files = RunFiles(Path(resolved.settings.data_dir))
    answer = _get_status(files)
    if as_json:
        click.echo(json.dumps(answer, indent=1))
        return
    for table in status_tables(answer, Path(resolved.settings.data_dir)):
        Console().print(table)


def _start_host(files: RunFiles, settings: Settings) -> "subprocess.Popen[bytes]":
    from serve.host import new_run_id

    files.begin(settings, new_run_id())
    with files.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.host", str(files.data_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=own_python_path(),
            start_new_session=True,  # Ctrl-C at the terminal is not meant for it
        )
    files.started(process.pid)
    return process


def _wait_until_ready(console: Console, files: RunFiles, process: "subprocess.Popen[bytes]") -> str:
    """Show the host's steps until the service can make a token; its URL."""
    deadline_s = time.monotonic() + UP_S
    trouble: str | None = ""
    with console.status("starting") as shown:
        while time.monotonic() < deadline_s:
            steps = files.steps()
            if steps:
                shown.update(steps[-1].text)
            if process.poll() is not None or (steps and steps[-1].name == "failed"):
                break
            if steps and steps[-1].name == "serving":
                trouble = _not_ready(steps[-1].text)
                if trouble is None:
                    return steps[-1].text
                shown.update(f"waiting for the replicas{trouble}")
            time.sleep(0.2)
    late = f"it took longer than {UP_S:g} s{trouble}"
    reason = next((s.text for s in files.steps() if s.name == "failed"), late)
    raise click.ClickException(
        f"the service did not come up: {reason}\n{tail(files.log, 8)}\n(whole log: {files.log})"
    )


def _not_ready(url: str) -> str | None:
    """None when /ready says yes, else what is known of why not."""
    try:
        if httpx.get(f"{url}/ready", timeout=15).status_code == 200:
            return None
        trouble = httpx.get(f"{url}/status", timeout=5).json().get("trouble")
    except httpx.HTTPError:
        return ""
    return f": {trouble}" if trouble else ""


def _stop(files: RunFiles) -> str:
    """End the run, if there is one, and clear what it or a dead one has left; says which it was."""
    pid = files.host_pid()
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        _wait_for_end(Console(), files, pid)
    left = _sweep(files)
    files.clear()
    return "stopped" if pid is not None else f"nothing was running{left}"


def _wait_for_end(console: Console, files: RunFiles, pid: int) -> None:
    deadline_s = time.monotonic() + DOWN_S + files.read_settings().http.drain_s
    with console.status("stopping"):
        while files.host_pid() is not None and time.monotonic() < deadline_s:
            time.sleep(0.1)
    if files.host_pid() is not None:
        os.kill(pid, signal.SIGKILL)


def _sweep(files: RunFiles) -> str:
    """End and remove whatever a run that did not end well has left; a few words on it."""
    from cluster.raylocal.record import drop_record, load_record
    from cluster.raylocal.sweep import sweep

    record = load_record(files.data_dir)
    ended = 0
    if record is not None:
        ended = len(sweep(record, files.data_dir).ended_pids)
        drop_record(files.data_dir)
    segments = files.clear_segments()
    if not ended and not segments:
        return ""
    return f"; ended {ended} processes and {len(segments)} shared segments left by a dead run"


def service_url(files: RunFiles) -> str:
    """Where the running service listens. ValueError when none runs."""
    serving = next((step for step in files.steps() if step.name == "serving"), None)
    if files.host_pid() is None or serving is None:
        raise ValueError(
            f"no service runs with data_dir = {files.data_dir}; `sanderling up` starts one"
        )
    return serving.text


def _get_status(files: RunFiles) -> dict[str, Any]:
    """GET /status. ClickException when the service does not say how it is."""
    try:
        answer = httpx.get(f"{service_url(files)}/status", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise click.ClickException(unwell(files, str(error) or type(error).__name__)) from error
    status: dict[str, Any] = answer.json()
    return status


def unwell(files: RunFiles, reason: str) -> str:
    return f"the service does not answer as it should: {reason}\n(its log: {files.log})"


def _answer(console: Console, url: str, question: str, key: str | None) -> None:
    """Ask the service as a client would and print the streamed answer."""
    from serve.bench import stream_chat

    started_s = time.monotonic()
    first_s: float | None = None
    console.print(f"> {question}", style="dim")
    for text in stream_chat(url, question, max_tokens=64, temperature=0.0, key=key):
        first_s = first_s or time.monotonic() - started_s
        console.print(text, end="", markup=False, highlight=False)
    console.print(f"\n(first token after {first_s or 0:.2f} s)", style="dim")


def _since(started_s: float) -> str:
    return f"{time.monotonic() - started_s:.0f} s"
