"""The wire between supervisor and workers: messages over an authenticated TCP connection.

One connection for each worker. Its end is how a worker's death is noticed, at once on one machine;
silence is how one that hangs, or whose machine went without a word, is.
"""

import socket
import threading
from multiprocessing.connection import Client, Connection

from train.elastic.messages import FromWorker, ToWorker, encode, from_worker, to_worker


class Channel:
    """One end of a connection; `send` from any thread, `receive` from one."""

    def __init__(self, connection: "Connection[bytes, bytes]") -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: FromWorker | ToWorker) -> bool:
        """False if the other end is gone."""
        try:
            with self._lock:
                self._connection.send_bytes(encode(message))
        except OSError:
            return False
        return True

    def ready(self, patience_s: float) -> bool:
        """Whether something (or the end) can be received within patience_s."""
        return self._connection.poll(patience_s)

    def from_worker(self) -> FromWorker:
        """The next message; EOFError or OSError at the end of the connection."""
        return from_worker(self._connection.recv_bytes())

    def to_worker(self) -> ToWorker:
        """The next message; EOFError or OSError at the end of the connection."""
        return to_worker(self._connection.recv_bytes())

    def own_host(self) -> str:
        """This machine's address as the other end's network reaches it."""
        with socket.socket(fileno=socket.dup(self._connection.fileno())) as copy:
            return str(copy.getsockname()[0])

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def connect(address: tuple[str, int], key: bytes) -> Channel:
    """A worker's end. AuthenticationError if the key is another supervisor's."""
    return Channel(Client(address, family="AF_INET", authkey=key))
