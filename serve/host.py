"""The background process that `sanderling up` leaves: it holds the Ray session, and with it all.

`python -m serve.host DATA_DIR` reads the resolved settings from DATA_DIR/run/settings.json, brings
up session, controller and HTTP front in that order, writes each step to DATA_DIR/run/progress, and
takes everything down again on SIGTERM or SIGINT, when what is open has finished.
"""

import contextlib
import secrets
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from cluster.raylocal.actors import Needs, start_named
from cluster.raylocal.front import front_environment, start_front, stop_front
from cluster.raylocal.session import RaySession
from cluster.settings import Settings
from serve.directory import Directory
from serve.runfiles import RunFiles

LOOK_S = 0.3
QUIET_LOOKS = 4  # together longer than controller.period_s is by default
STOP_S = 20.0  # for the controller to stop its replicas, before the session ends them anyway


def main(data_dir: Path) -> int:
    """Serve until told to stop; exit status 1 when something did not come up."""
    files = RunFiles(data_dir)
    settings = Settings.model_validate_json(files.settings.read_text())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve(settings, files, stop)
    except Exception as error:
        traceback.print_exc()
        files.say("failed", str(error).strip() or type(error).__name__)
        return 1
    finally:
        files.clear_segments()
    files.say("stopped", "")
    return 0


def serve(settings: Settings, files: RunFiles, stop: threading.Event) -> None:
    """Bring everything up, wait for `stop`, take everything down."""
    files.say("session", "starting Ray")
    with RaySession(settings, environment=lambda folder: front_environment(settings, folder)):
        controller = start_controller(settings, files.run_id)
        try:
            files.say("front", "starting the HTTP front and the replicas")
            from serve.app import application

            front = start_front(application(settings), settings)
            files.say("serving", front.url)
            stop.wait()
            drain(controller, settings.http.drain_s)
        finally:
            stop_front()
            end_controller(controller)


def start_controller(settings: Settings, run_id: str) -> Any:
    """The controller actor, told to begin."""
    from serve.actors import CONTROLLER, ControllerActor

    actor = start_named(
        ControllerActor, CONTROLLER, settings.model_dump_json(), run_id, needs=Needs(), restarts=-1
    )
    actor.watch.remote(0, 0.0)  # the first call starts its loop; the answer is of no interest
    return actor


def drain(controller: Any, deadline_s: float) -> None:
    """Turn readiness off and wait until nothing is open any more, at most `deadline_s`."""
    import ray

    end_s = time.monotonic() + deadline_s
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(controller.close.remote(), timeout=STOP_S)
        quiet = 0
        # What replicas report is a look old: two quiet ones in a row, and none of them before it.
        while quiet < QUIET_LOOKS and time.monotonic() < end_s:
            time.sleep(LOOK_S)
            directory = ray.get(controller.watch.remote(0, 0.0), timeout=STOP_S)
            quiet = 0 if open_sequences(directory) else quiet + 1


def open_sequences(directory: Directory) -> int:
    """Requests that decode replicas have, by their last answers."""
    stats = [e.state.stats for e in directory.entries if e.role == "decode" and e.state is not None]
    return sum(s.running + s.waiting + s.reserved for s in stats)


def end_controller(controller: Any) -> None:
    """Let the controller stop its replicas, then end it; whatever fails here, the session ends."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(controller.stop.remote(), timeout=STOP_S)
    ray.kill(controller, no_restart=True)


def new_run_id() -> str:
    """A name that tells this run's shared memory from another's."""
    return secrets.token_hex(4)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
