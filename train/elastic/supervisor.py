"""The supervisor: hears all workers, asks `Membership` what to do, and does it.

It computes nothing and imports no torch. Workers end with it: they notice that their connection is
gone. `run` is one loop in the caller's thread; notices and new sizes may come from other threads.
"""

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import NamedTuple, Protocol

from train.elastic.channel import Channel
from train.elastic.membership import JobFailed, Launch, Membership, Policy
from train.elastic.messages import Beat, Failed, Finished, FromWorker, Hello, Idle, Plan, Resumed

log = logging.getLogger(__name__)
LEAVING_S = 60.0
"""How long a worker may take to leave once the job is finished; then it is ended."""


class Launcher(Protocol):
    """Starts and ends workers' processes: plain ones, or Ray's actors."""

    def start(self, name: str, machine: str, address: tuple[str, int], key: bytes) -> None:
        """A process that connects to `address` as worker `name`. Returns at once."""
        ...

    def kill(self, name: str) -> None:
        """Ends it without asking; nothing if it is gone."""
        ...

    def ending(self, name: str) -> str:
        """How the process is known to have ended, also before it connected; "" while it lives."""
        ...

    def notices(self) -> dict[str, float]:
        """Machines that go: their names, as workers say them, to seconds from now."""
        ...

    def close(self) -> None:
        """Ends whatever is left."""
        ...


class Journal(NamedTuple):
    """Something that happened, at a time of the supervisor's clock."""

    at_s: float
    what: Plan | Finished | Resumed | Hello | Idle | str
    worker: str = ""


class Event(NamedTuple):
    """From another thread: a worker's message, or None for its end, or a call for the loop."""

    worker: str
    message: FromWorker | None
    call: Callable[[], None] | None = None


@dataclass
class Report:
    """What became of a job. losses: by step, of the attempt that counts."""

    steps: int
    losses: dict[int, float] = field(default_factory=dict)
    journal: list[Journal] = field(default_factory=list)

    def plans(self) -> list[Plan]:
        """Every generation's."""
        return [entry.what for entry in self.journal if isinstance(entry.what, Plan)]

    def lost(self) -> list[str]:
        """What could not be saved, in words; empty when nothing was lost."""
        return [sentence for plan in self.plans() for sentence in plan.lost]


class Supervisor:
    """One job's workers. silence_s: a worker not heard of for so long is killed and replaced."""

    def __init__(
        self,
        policy: Policy,
        launcher: Launcher,
        *,
        machines: tuple[str, ...] = (),
        host: str = "127.0.0.1",
        silence_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.members = Membership(policy, machines)
        self.report = Report(0)
        self._launcher, self._silence_s, self._clock = launcher, silence_s, clock
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._channels: dict[str, Channel] = {}
        self._heard_s: dict[str, float] = {}
        self._places: dict[str, str] = {}
        self._finished_s = float("inf")
        self.over = False  # `run` has come to its end, well or not
        self._key = secrets.token_bytes(32)
        self._listener = Listener((host, 0), family="AF_INET", authkey=self._key)
        self.on_event: Callable[[Journal], None] = lambda entry: None

    def run(self, deadline_s: float = float("inf")) -> Report:
        """Until the last step is finished and every worker has left.

        JobFailed if the job's own code fails, workers cannot start, or deadline_s passes.
        """
        threading.Thread(target=self._accept, daemon=True, name="accept").start()
        end_s = self._clock() + deadline_s
        try:
            while self._busy():
                self._obey()
                self._hear(0.05)
                self._watch()
                if self._clock() > end_s:
                    raise JobFailed(f"not finished within {deadline_s:g} s; {self._standing()}")
        finally:
            self._launcher.close()
            self._listener.close()
            self.over = True
        self.report.steps = self.members.reached
        return self.report

    def _busy(self) -> bool:
        """Whether the job runs, or a worker is still on its way out."""
        if self.members.phase != "finished":
            return True
        self._finished_s = min(self._finished_s, self._clock())
        leaving = any(worker.state != "starting" for worker in self.members.workers.values())
        return leaving and self._clock() - self._finished_s < LEAVING_S

    # From other threads.

    def notice(self, worker: str, notice_s: float) -> None:
        """The worker's machine goes in notice_s seconds."""
        self._call(lambda: self._noticed(worker, notice_s))

    def resize(self, target: int) -> None:
        """So many workers from the next step boundary on."""
        self._call(lambda: self.members.resize(target))

    def release(self, workers: tuple[str, ...], notice_s: float) -> None:
        """These workers leave for good, one fewer each; they have notice_s to hand over."""
        self._call(lambda: self._release(workers, notice_s))

    def change_machines(self, machines: tuple[str, ...], notice_s: float) -> None:
        """Exactly these machines from the next step boundary on; a worker on another one leaves,
        which it has notice_s for."""
        self._call(lambda: self._move(machines, notice_s))

    def _call(self, call: Callable[[], None]) -> None:
        self._events.put(Event("", None, call))

    # The loop.

    def _obey(self) -> None:
        for order in self.members.orders(self._clock()):
            if isinstance(order, Launch):
                self._note(f"launched on {order.machine or 'any machine'}", order.worker)
                self._heard_s[order.worker] = self._clock()
                address = (str(self._listener.address[0]), int(self._listener.address[1]))
                self._launcher.start(order.worker, order.machine, address, self._key)
                continue
            if isinstance(order.message, Plan) and order.worker == order.message.ranks[0]:
                self._note(order.message)
            channel = self._channels.get(order.worker)
            if channel:  # else its end is on the way to us
                channel.send(order.message)

    def _hear(self, patience_s: float) -> None:
        try:
            event = self._events.get(timeout=patience_s)
        except queue.Empty:
            return
        while True:
            self._handle(event)
            if isinstance(event.message, Idle) or event.message is None:
                return  # the next orders may depend on it
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return

    def _handle(self, event: Event) -> None:
        if event.call:
            event.call()
            return
        if event.worker not in self.members.workers:
            return
        message = event.message
        if message is None:
            self._end(event.worker)
            return
        if isinstance(message, Beat):
            return
        if isinstance(message, Failed):
            raise JobFailed(f"worker {event.worker}: {message.detail}")
        self._note(message, event.worker)
        if isinstance(message, Hello):
            self._places[event.worker] = message.machine
        elif isinstance(message, Finished):
            self._finished(message)
        elif isinstance(message, Idle):
            if message.last:
                self._finished(message.last)
            self.members.idle(event.worker, message)

    def _finished(self, step: Finished) -> None:
        if step.generation == self.members.generation:
            self.report.losses[step.step] = step.loss
            self.members.finished(step)

    def _end(self, name: str, why: str = "") -> None:
        self._note("gone", name)
        self._channels.pop(name, None)
        self._launcher.kill(name)
        self.members.lost(name, why)

    def _watch(self) -> None:
        """Hanging workers, ones that ended before they connected, and notices."""
        now_s = self._clock()
        for name in list(self.members.workers):
            silent = now_s - self._heard_s[name] > self._silence_s and name in self._channels
            early = "" if name in self._channels else self._launcher.ending(name)
            if silent or early:
                self._note(f"silent for {self._silence_s:g} s" if silent else early, name)
                self._end(name, early)
        for machine, notice_s in self._launcher.notices().items():
            for name in self.members.workers:
                if self._places.get(name) == machine:
                    self._noticed(name, notice_s)

    def _noticed(self, name: str, notice_s: float) -> None:
        worker = self.members.workers.get(name)
        if worker and worker.doomed_s is None:
            self._note(f"its machine goes in {notice_s:g} s", name)
            self.members.notice(name, self._clock() + notice_s)

    def _release(self, workers: tuple[str, ...], notice_s: float) -> None:
        leaving = [name for name in workers if name in self.members.workers]
        self.members.resize(self.members.policy.target - len(leaving))
        for name in leaving:
            self._noticed(name, notice_s)

    def _move(self, machines: tuple[str, ...], notice_s: float) -> None:
        self.members.machines = machines
        self.members.resize(len(machines))
        for worker in list(self.members.workers.values()):
            if worker.machine not in machines:
                self._noticed(worker.name, notice_s)
                if worker.state == "starting":  # it has nothing that it could hand over
                    self._end(worker.name)

    def _note(self, what: Plan | Finished | Resumed | Hello | Idle | str, worker: str = "") -> None:
        entry = Journal(self._clock(), what, worker)
        self.report.journal.append(entry)
        self.on_event(entry)

    def _standing(self) -> str:
        states = ", ".join(f"{w.name} {w.state}" for w in self.members.workers.values())
        return f"step {self.members.reached}, {self.members.phase}, {states or 'no worker'}"

    # Threads that only listen.

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, ConnectionError) as error:
                log.warning("a stranger was refused: %s", error)
                continue
            except OSError:
                return  # the listener is closed
            thread = threading.Thread(target=self._read, args=(connection,), daemon=True)
            thread.start()

    def _read(self, connection: "Connection[bytes, bytes]") -> None:
        channel = Channel(connection)
        name = ""
        try:
            hello = channel.from_worker()
            if not isinstance(hello, Hello):
                return
            name = hello.worker
            self._events.put(Event("", None, lambda: self._channels.update({name: channel})))
            self._events.put(Event(name, hello))
            while True:
                message = channel.from_worker()
                # Noted here, not in the loop: a loop that was held up must take nobody for silent.
                self._heard_s[name] = self._clock()
                self._events.put(Event(name, message))
        except (EOFError, OSError):
            self._events.put(Event(name, None))
        finally:
            channel.close()
