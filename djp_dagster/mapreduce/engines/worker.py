"""``python -m djp_dagster.mapreduce.engines.worker FD``: does attempts that come over a socket. See `Processes`."""

import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from djp_dagster.mapreduce.engines.base import Alive, Attempt, Done, Raised, Setup, perform, place_of
from djp_dagster.mapreduce.place import WorkPlace

_BEAT_S = 0.5


class Heart:
    """Says that an attempt gets on, now and then."""

    def __init__(self, connection: Connection, attempt: Attempt) -> None:
        self._connection, self._attempt = connection, attempt
        self._records, self._last = 0, time.monotonic()

    def beat(self, records: int) -> None:
        """So many more records are done."""
        self._records += records
        now = time.monotonic()
        if now - self._last >= _BEAT_S:
            self._connection.send_bytes(pickle.dumps(Alive(self._attempt, self._records)))
            self._records, self._last = 0, now

    def rest(self) -> Alive:
        """What was not said yet."""
        return Alive(self._attempt, self._records)


def main(handle: int) -> None:
    """Work until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started this
    connection = Connection(handle)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=[connection, inbox], daemon=True).start()
    import pyarrow as pa

    pa.set_cpu_count(1)  # there is a process for every processor
    setup: Setup = pickle.loads(inbox.get())  # noqa: S301  of the process that started this one
    place = place_of(setup)
    while True:
        _do(connection, setup, place, pickle.loads(inbox.get()))  # noqa: S301


def _listen(connection: Connection, inbox: "queue.SimpleQueue[bytes]") -> None:
    """Take in what comes; when nobody is there any more, end, whatever the attempt is doing."""
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def _do(connection: Connection, setup: Setup, place: WorkPlace, attempt: Attempt) -> None:
    heart = Heart(connection, attempt)
    try:
        answer = perform(setup, place, attempt, heart.beat)
    except Exception as error:  # noqa: BLE001  told to whoever decides whether it is tried again
        connection.send_bytes(_told(attempt, error))
    else:
        connection.send_bytes(pickle.dumps(heart.rest()))
        connection.send_bytes(pickle.dumps(Done(attempt, answer)))


def _told(attempt: Attempt, error: Exception) -> bytes:
    trace = traceback.format_exc()
    error.__traceback__ = None
    try:
        told = pickle.dumps(Raised(attempt, error, trace))
        pickle.loads(told)  # noqa: S301  some exceptions can be sent, and not be received
    except Exception:  # noqa: BLE001  whatever is wrong with it, its text remains
        told = pickle.dumps(Raised(attempt, RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return told


if __name__ == "__main__":
    main(int(sys.argv[1]))
