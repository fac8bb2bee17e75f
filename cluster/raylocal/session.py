"""A connection to Ray: one of our own on this machine, or an existing cluster we only visit.

Our own never attaches to, and never stops, another Ray; everything it starts listens on 127.0.0.1,
asks for a random token, and leaves neither a process nor a file outside the data folder after
stop(). The driver (`sanderling up`) holds the RaySession; other commands use attach().
"""

import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

import psutil

from cluster.raylocal.private import LOOPBACK_VARIABLE, forget_serve, reread_environment
from cluster.raylocal.record import (
    MARK_VARIABLE,
    TOKEN_FILE,
    SessionRecord,
    drop_record,
    load_record,
    ray_folder,
    save_record,
)
from cluster.raylocal.sweep import Swept, driver_lives, session_processes, sweep
from cluster.settings import Settings

NAMESPACE = "sanderling"
FOLDER_PREFIX = "sanderling-"
LONGEST_TEMPORARY_FOLDER_BYTES = 11
"""A unix socket's path may have 107 bytes, HAProxy's 97; its socket adds 86 to the folder's:
/sanderling-12345678/h/(56 characters of a node's id)/a.sock. Ray's own adds as many."""


class RaySession:
    """One process's session with Ray; start() once, stop() once, or use it as a context.

    settings: [ray] and data_dir are read.
    cpus: CPUs that our own Ray may hand out; None is all of this machine's. Not for a cluster.
    labels: labels of this machine's node in our own Ray.
    environment: gives the variables that every process of our own Ray gets; it is handed a private
        folder that ends with the session (partial(front.front_environment, settings)).
    """

    def __init__(
        self,
        settings: Settings,
        *,
        cpus: int | None = None,
        labels: Mapping[str, str] = MappingProxyType({}),
        environment: Callable[[Path], Mapping[str, str]] | None = None,
    ) -> None:
        self._ray = settings.ray
        self._data_dir = Path(settings.data_dir)
        self._cpus = cpus
        self._labels = dict(labels)
        self._environment = environment
        self._before: dict[str, str | None] = {}
        self.record: SessionRecord | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> SessionRecord:
        """Start our own Ray or attach to `ray.address`; returns what other commands need.

        ValueError if a session of this data folder still runs. ConnectionError if there is no
        cluster at `ray.address`.
        """
        assert self.record is None, "a RaySession is started once"
        _refuse_second(self._data_dir)
        folder = ray_folder(self._data_dir)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.record = _new_record("", "", "")
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            if self._ray.address == "local":
                self._start_own()
            else:
                self._join()
        except BaseException:
            self.stop()
            raise
        if on_term is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)  # ray.init has put its own, a sys.exit
        assert self.record
        return self.record

    def _start_own(self) -> None:
        import ray

        private = _private_folder()
        token_file = _write_token(self._data_dir) if self._ray.auth == "token" else ""
        self.record = _new_record("", private, token_file)
        # On disk before the first process: whatever happens from here on can be swept.
        save_record(self._data_dir, self.record)
        front = Path(private, "h")
        front.mkdir(mode=0o700)
        extra = self._environment(front) if self._environment else {}
        self._set_environment({**_own_environment(private, token_file, self._ray.auth), **extra})
        ray.init(
            "local",
            num_cpus=self._cpus,
            labels=self._labels or None,
            namespace=NAMESPACE,
            object_store_memory=self._ray.object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=f"{private}/r",
        )
        self.record = _new_record(_gcs_address(), private, token_file)
        save_record(self._data_dir, self.record)

    def _join(self) -> None:
        import ray

        self._set_environment({"RAY_AUTH_MODE": self._ray.auth})
        try:
            ray.init(
                self._ray.address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ConnectionError(
                f"no Ray lets us in at ray.address = {self._ray.address!r}: check the address and, "
                f"with ray.auth = {self._ray.auth!r}, the token (RAY_AUTH_TOKEN_PATH); {error}"
            ) from error
        self.record = _new_record(_gcs_address(), "", "")
        save_record(self._data_dir, self.record)

    def _set_environment(self, values: Mapping[str, str | None]) -> None:
        """Ray's processes inherit it from here; stop() puts back what was there before."""
        self._before = {name: os.environ.get(name) for name in values}
        _update_environment(values)

    def pids(self) -> list[int]:
        """The processes this session has started and that are alive now."""
        return [process.pid for process in session_processes(self.record)] if self.record else []

    def stop(self) -> Swept:
        """Disconnect; end every process and remove every file of our own Ray. Idempotent.

        Somebody else's cluster only loses this connection; what runs in it goes on.
        """
        import ray

        if self.record is None:
            return Swept((), (), ())
        ray.shutdown()
        forget_serve()
        swept = sweep(self.record, self._data_dir)
        drop_record(self._data_dir)
        self.record = None
        _update_environment(self._before)
        return swept


def attach(data_dir: Path) -> SessionRecord:
    """Connect this process to the session that runs with `data_dir`, as a visitor.

    Leave with ray.shutdown(), which ends only the visit. ValueError when none runs.
    """
    import ray

    record = load_record(data_dir)
    if record is None or not record.address:
        raise ValueError(f"no session runs with data_dir = {data_dir}; `sanderling up` starts one")
    if record.embedded:
        auth = "token" if record.token_file else "disabled"
        _update_environment(_own_environment(record.folder, record.token_file, auth))
    ray.init(
        record.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING
    )
    return record


def _own_environment(private: str, token_file: str, auth: str) -> dict[str, str | None]:
    return {
        LOOPBACK_VARIABLE: "0",
        MARK_VARIABLE: private,
        "RAY_AUTH_MODE": auth,
        "RAY_AUTH_TOKEN": None,  # it would win over the path
        "RAY_AUTH_TOKEN_PATH": token_file or None,
        # Its control store would keep a record of every actor call: some MB for each busy minute.
        "RAY_task_events_report_interval_ms": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _update_environment(values: Mapping[str, str | None]) -> None:
    """Set what has a value, remove what has None, and have Ray look again."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    reread_environment()


def _refuse_second(data_dir: Path) -> None:
    record = load_record(data_dir)
    if record and record.embedded and driver_lives(record):
        raise ValueError(
            f"a session with data_dir = {data_dir} already runs (process {record.driver_pid}); "
            "`sanderling down` ends it, another data_dir runs beside it"
        )
    if record:
        sweep(record, data_dir)
        drop_record(data_dir)


def _private_folder() -> str:
    """A fresh folder only we may enter: Ray makes its own world-writable, sockets included.

    In $TMPDIR or, where that has too long a path for sockets, in /tmp; for the same reason not in
    the data folder.
    """
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > LONGEST_TEMPORARY_FOLDER_BYTES:
        base = "/tmp"
    return tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base)


def _write_token(data_dir: Path) -> str:
    path = ray_folder(data_dir) / TOKEN_FILE
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    return str(path)


def _gcs_address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _new_record(address: str, private: str, token_file: str) -> SessionRecord:
    me = psutil.Process()
    return SessionRecord(address, private, token_file, me.pid, me.create_time())
