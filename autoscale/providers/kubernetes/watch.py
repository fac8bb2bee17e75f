"""Wakes the loop when something happens to nodes or pods, so that a notice is not heard only at the
next period.

State always comes from listings: a watch that is dropped, too old or stale costs time, and nothing
else.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from autoscale.providers.kubernetes.api import Api, ApiFailed, Expired
from autoscale.providers.kubernetes.notices import doomed_s

LOG = logging.getLogger(__name__)
LASTS_S = 60  # of one watch: how long a silent connection is believed
PAUSE_S = 1.0


class Watch:
    """Of one resource. wake: called from the watch's thread. relisted, resumed: how often it had
    to begin anew, and to go on."""

    def __init__(
        self,
        api: Api,
        resource: str,
        wake: Callable[[], None],
        *,
        selector: str = "",
        pause_s: float = PAUSE_S,
        lasts_s: int = LASTS_S,
    ) -> None:
        self.api, self.resource, self.wake = api, resource, wake
        self.query = {"labelSelector": selector} if selector else {}
        self.pause_s, self.lasts_s = pause_s, lasts_s
        self.relisted = self.resumed = 0
        self._stop = threading.Event()
        name = f"watch-{resource}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; a thread of its own, which blocks nobody's end."""
        self._thread.start()

    def close(self) -> None:
        """The thread ends with its present watch, at the latest."""
        self._stop.set()

    def _run(self) -> None:
        since = ""
        while not self._stop.is_set():
            try:
                if not since:
                    since = self._listed()
                    if self.relisted > 1:
                        self.wake()  # nobody knows what was missed up to here
                since = self._follow(since)
                self.resumed += 1
            except Expired:
                since = ""
            except ApiFailed as error:
                LOG.info("watch: %s", error)
                self._stop.wait(self.pause_s)

    def _listed(self) -> str:
        """The version from which on to watch."""
        self.relisted += 1
        found = self.api.list(self.resource, limit="1", **self.query)
        return str(found["metadata"]["resourceVersion"])

    def _follow(self, since: str) -> str:
        """The version that a watch reached when it ended in order."""
        reached = since
        for event in self.api.watch(self.resource, since, self.lasts_s, **self.query):
            if self._stop.is_set():
                break
            reached = event["object"]["metadata"]["resourceVersion"]
            if matters(event):
                self.wake()
        return reached


def matters(event: dict[str, Any]) -> bool:
    """A machine was marked or lost, or a pod ends: not every heartbeat."""
    body = event["object"]
    if event["type"] == "BOOKMARK":
        return False
    if event["type"] == "DELETED" or body["metadata"].get("deletionTimestamp"):
        return True
    return body.get("kind") == "Node" and doomed_s(body, 0.0, 1.0) is not None
