"""A TCP proxy that cuts connections at chosen moments, to put faults between a client and its server."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from typing_extensions import Self

from tests.servers.ports import free_port

When = Literal["before", "after"]

_CHUNK = 64 * 1024
_POLL_SECONDS = 0.05
_JOIN_SECONDS = 10.0


@dataclass(frozen=True)
class Cut:
    """A cut to be made once, on the first connection that sends the pattern.

    Attributes:
        pattern: The bytes from client to server that set it off.
        when: ``before`` the server sees them, or ``after`` it has begun to answer.
        done: Set when both sides have been closed.
    """

    pattern: bytes
    when: When
    done: threading.Event = field(default_factory=threading.Event)


class TcpProxy:
    """Forwards a port of 127.0.0.1 to another one and cuts connections when told to.

    Attributes:
        port: Where clients connect.
    """

    def __init__(self, upstream_port: int) -> None:
        self.port = free_port()
        self._upstream_port = upstream_port
        self._lock = threading.Lock()
        self._links: list[_Link] = []
        self._armed: Cut | None = None
        self._accepting = threading.Event()
        self._acceptor: threading.Thread | None = None
        self.resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cut_on(self, pattern: bytes, when: When) -> Cut:
        """Arm one cut, in place of one that is still armed; wait for the ``done`` of what is returned.

        ``before``: the bytes do not reach the server. ``after``: they do, and what the server sends from then
        on does not reach the client: with ``b"COMMIT"``, a commit made and never confirmed.
        """
        if not pattern:
            raise ValueError("pattern is empty; give the bytes whose sight sets off the cut")
        cut = Cut(pattern, when)
        with self._lock:
            self._armed = cut
        return cut

    def pause(self) -> None:
        """Cut all connections and refuse new ones until `resume`."""
        self._accepting.clear()
        if self._acceptor is not None:
            self._acceptor.join(_JOIN_SECONDS)
            self._acceptor = None
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.cut()
        for link in links:
            link.join()

    def resume(self) -> None:
        """Accept connections, on the same port as ever."""
        if self._acceptor is not None:
            return
        listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        listener.settimeout(_POLL_SECONDS)
        self._accepting.set()
        self._acceptor = threading.Thread(target=self._accept, args=[listener], name="tcp-proxy", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Cut all connections and release every thread and socket."""
        self.pause()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while self._accepting.is_set():
                try:
                    client, _ = listener.accept()
                except TimeoutError:
                    self._reap()
                    continue
                client.settimeout(None)
                try:
                    server = socket.create_connection(("127.0.0.1", self._upstream_port))
                except OSError:
                    client.close()
                    continue
                link = _Link(self, client, server)
                with self._lock:
                    self._links.append(link)
                link.start()

    def _reap(self) -> None:
        with self._lock:
            ended = [link for link in self._links if link.ended]
            self._links = [link for link in self._links if link not in ended]
        for link in ended:
            link.join()

    def _take(self, sent: bytes) -> Cut | None:
        """The armed cut, disarmed, if its pattern occurs in what a client sent."""
        with self._lock:
            cut = self._armed
            if cut is None or cut.pattern not in sent:
                return None
            self._armed = None
            return cut

    def _tail(self, sent: bytes) -> bytes:
        """What must be kept of the bytes sent to recognise a pattern that is split between two reads."""
        with self._lock:
            keep = len(self._armed.pattern) - 1 if self._armed is not None else 0
        return sent[-keep:] if keep else b""


class _Link:
    """One client's connection and its counterpart to the server, with a thread for each direction."""

    def __init__(self, proxy: TcpProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._cut: Cut | None = None
        self._threads = [
            threading.Thread(target=self._send, name="tcp-proxy-send", daemon=True),
            threading.Thread(target=self._answer, name="tcp-proxy-answer", daemon=True),
        ]

    @property
    def ended(self) -> bool:
        """Whether both directions are closed; `join` then does not wait."""
        return not any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Begin to forward."""
        for thread in self._threads:
            thread.start()

    def cut(self) -> None:
        """Close both connections, which ends both threads."""
        for end in (self._client, self._server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait for the threads and release the sockets."""
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
            if thread.is_alive():
                raise RuntimeError(f"{thread.name} did not end within {_JOIN_SECONDS:.0f} s")
        self._client.close()
        self._server.close()

    def _send(self) -> None:
        tail = b""
        with suppress(OSError):
            while chunk := self._client.recv(_CHUNK):
                sent = tail + chunk
                tail = self._proxy._tail(sent)
                cut = self._proxy._take(sent)
                if cut is not None and cut.when == "before":
                    self.cut()
                    cut.done.set()
                    return
                if cut is not None:
                    # Known before the request leaves: its answer cannot slip through.
                    self._cut = cut
                self._server.sendall(chunk)
        if self._cut is None:
            self.cut()

    def _answer(self) -> None:
        with suppress(OSError):
            while (chunk := self._server.recv(_CHUNK)) and self._cut is None:
                self._client.sendall(chunk)
        self.cut()
        if self._cut is not None:
            self._cut.done.set()
