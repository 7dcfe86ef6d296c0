"""`SignalledEvent`: an event that a signal handler may set while the same thread waits for it."""

import threading
from contextlib import suppress
from queue import Empty, SimpleQueue


class SignalledEvent(threading.Event):
    """An event to be set by a signal handler, once.

    `threading.Event` takes a lock in ``set``, which ``wait`` holds for moments. A handler that comes at such a moment,
    in the thread that waits, would wait for it for ever. A `queue.SimpleQueue` may be put into at any moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told = False
        self._wakes: SimpleQueue[None] = SimpleQueue()

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._told

    def set(self) -> None:
        """Set it, and wake all who wait."""
        self._told = True
        self._wakes.put(None)

    def clear(self) -> None:
        """Refused: who has been told to stop has been told.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("an event that a signal sets stays set; make another one")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, or for ``timeout`` seconds; whether it is set."""
        if not self._told:
            with suppress(Empty):
                try:
                    self._wakes.get(timeout=None if timeout is None else max(timeout, 0.0))
                finally:
                    if self.is_set():
                        self._wakes.put(None)  # for the next who waits
        return self._told
