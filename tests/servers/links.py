"""A listening socket that knows its connections, so that a test can cut them, and end their threads."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress
from socketserver import ThreadingTCPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from http.server import BaseHTTPRequestHandler

_JOIN_S = 10.0


class CutError(Exception):
    """The connection is to be cut here."""


def cut(link: socket.socket) -> None:
    """Cut a connection, whatever state it is in."""
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


class Links(ThreadingTCPServer):
    """Listens on a port of 127.0.0.1, with a thread for each connection.

    Args:
        port: where.
        handler: of each connection.
        name: what its threads are called.

    Attributes:
        closing: set when it is about to end; whoever waits in a handler ends then.
        errors: what handlers raised that is no breaking connection, which is what these servers are for.
    """

    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler], name: str) -> None:
        self._name = name
        self.closing = threading.Event()
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._links: dict[socket.socket, threading.Thread] = {}
        super().__init__(("127.0.0.1", port), handler)
        self._thread = threading.Thread(target=self.serve_forever, args=[0.02], name=name, daemon=True)
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name=f"{self._name}-link", daemon=True
        )
        with self._lock:
            self._links = {link: worker for link, worker in self._links.items() if worker.is_alive()}
            self._links[request] = thread
            thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what is not a connection that breaks."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.errors.append(error)

    def alive(self) -> int:
        """How many connections there are."""
        with self._lock:
            return sum(worker.is_alive() for worker in self._links.values())

    def stop_listening(self) -> None:
        """No new connections; those there are go on."""
        self.shutdown()
        self._thread.join(_JOIN_S)
        self.closing.set()

    def cut_all(self) -> None:
        """Cut every connection, and wait for its thread."""
        with self._lock:
            links = dict(self._links)
        for link in links:
            cut(link)
        for thread in links.values():
            thread.join(_JOIN_S)
            if thread.is_alive():
                raise RuntimeError(f"{thread.name} did not end within {_JOIN_S:.0f} s")

    def end(self) -> None:
        """Cut every connection, and release the socket.

        Raises:
            RuntimeError: a handler has failed, or does not end.
        """
        self.cut_all()
        self.server_close()
        if self.errors:
            raise RuntimeError(f"{self._name} itself has failed") from self.errors[0]
