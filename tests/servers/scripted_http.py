"""An HTTP server that answers as a test tells it to, also with nothing, half an answer, or one that comes too late."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from typing_extensions import Self

from tests.servers.links import CutError, Links, cut
from tests.servers.ports import free_port

_PATIENT_S = 30.0


@dataclass(frozen=True)
class Request:
    """A request as it came.

    Attributes:
        target: path and query, as they were sent.
        at: seconds of `time.monotonic`, when all of it had come.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    at: float

    @property
    def path(self) -> str:
        """Without the query, and decoded."""
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        """The first value of each parameter."""
        return {name: values[0] for name, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """What is done with a request.

    Attributes:
        body: bytes are sent as they are, everything else as JSON.
        delay_s: before the first byte.
        cut_at: the connection is cut after so many bytes of the body; -1: before any byte.
        piece: how many bytes of the body are sent at once; all of it with the headers unless given.
        pause_s: before each of these pieces, and after the last.
        never: it is never answered; the connection stays open.
        chunked: the body's length is not told.
    """

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_at: int | None = None
    piece: int | None = None
    pause_s: float = 0.0
    never: bool = False
    chunked: bool = False


NEVER = Answer(never=True)
CUT = Answer(cut_at=-1)
"""The request is taken, and the connection cut; a responder that returns this may have done what was asked."""
Responder = Callable[[Request], Answer]


class ScriptedHttp:
    """Listens on a port of 127.0.0.1; each request is met by the next answer of the script, then by the responder.

    Args:
        responder: answers what the script does not; it is called in several threads. 404 unless given.

    Attributes:
        port: Where it listens.
        requests: All that have come whole, in order.
        most_at_once: How many were being answered at the same time, at most; one is until just before its last byte,
            for then its client may send the next.
        connections: How many have been opened.
    """

    def __init__(self, responder: Responder | None = None) -> None:
        self.responder = responder or (lambda _: Answer(404))
        self.port = free_port()
        self.requests: list[Request] = []
        self.most_at_once = self.connections = 0
        self._at_once = 0
        self._script: list[Answer | Responder] = []
        self._changed = threading.Condition()
        self._gate = threading.Event()
        self._gate.set()
        self._listener = _Listener(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        """How many are."""
        return self._listener.alive()

    def script(self, *answers: Answer | Responder) -> None:
        """Answer the next requests like this, one each."""
        with self._changed:
            self._script.extend(answers)

    def wait_for(self, holds: Callable[[Self], bool], what: str) -> None:
        """Wait until what has come fulfils a condition; the time limit only ends a test that would never end."""
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self), _PATIENT_S), f"waited {_PATIENT_S:.0f} s for {what}"

    def wait_for_requests(self, number: int) -> None:
        """Wait until so many have come."""
        self.wait_for(lambda server: len(server.requests) >= number, f"request {number}")

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within the block, requests come, and are answered when it ends."""
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def close(self) -> None:
        """Cut all connections and release every thread and socket."""
        self._listener.stop_listening()
        self._gate.set()
        self._listener.end()

    def _begin(self, request: Request) -> Answer:
        """Note what has come; what to do with it, which may take a while."""
        with self._changed:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            answer = self._script.pop(0) if self._script else self.responder
            self._changed.notify_all()
        self._gate.wait()
        return answer if isinstance(answer, Answer) else answer(request)

    def _end(self) -> None:
        with self._changed:
            self._at_once -= 1
            self._changed.notify_all()

    def _connected(self) -> None:
        with self._changed:
            self.connections += 1


class _Listener(Links):
    """Tells whose it is of every connection."""

    def __init__(self, server: ScriptedHttp) -> None:
        self.scripted = server
        super().__init__(server.port, _Handler, "scripted")

    def process_request(self, request: Any, client_address: Any) -> None:
        self.scripted._connected()
        super().process_request(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One client's connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        request = Request(self.command, self.path, dict(self.headers.items()), body, time.monotonic())
        scripted = self.server.scripted
        with ExitStack() as under_way:
            under_way.callback(scripted._end)
            try:
                self._answer(scripted._begin(request), under_way)
            except (CutError, OSError):
                self.close_connection = True
                cut(self.connection)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _handle  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: the tests look at `ScriptedHttp.requests`."""

    def _answer(self, answer: Answer, under_way: ExitStack) -> None:
        self._wait(answer.delay_s)
        if answer.never:
            self.server.closing.wait()
        if answer.never or answer.cut_at == -1:
            raise CutError
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        *pieces, last = [*_pieces(body, answer), b"0\r\n\r\n" if answer.chunked and answer.cut_at is None else b""]
        head = self._head(answer, len(body))
        if not answer.piece:
            head, pieces, last = b"", [], b"".join([head, *pieces, last])
        for piece in filter(None, [head, *pieces]):
            self.wfile.write(piece)
            self._wait(answer.pause_s)
        under_way.close()
        self.wfile.write(last)  # with what goes before, unless in pieces: no packet waits for an acknowledgement
        if answer.cut_at is not None:
            raise CutError

    def _head(self, answer: Answer, length: int) -> bytes:
        headers = {"Content-Type": "application/json", **answer.headers}
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif answer.status not in {204, 304}:
            headers.setdefault("Content-Length", str(length))
        lines = [f"HTTP/1.1 {answer.status} As-Told", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _wait(self, seconds: float) -> None:
        if seconds and self.server.closing.wait(seconds):
            raise CutError


def _pieces(body: bytes, answer: Answer) -> Iterator[bytes]:
    """What is sent of the body, framed if need be."""
    sent = body if answer.cut_at is None else body[: answer.cut_at]
    size = answer.piece or len(sent)
    for start in range(0, len(sent), size or 1):
        piece = sent[start : start + size]
        yield b"%x\r\n%b\r\n" % (len(piece), piece) if answer.chunked else piece
