"""An HTTP proxy in front of an S3 server that does to chosen requests what networks and stores do to them."""

from __future__ import annotations

import hashlib
import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Protocol

from typing_extensions import Self

from tests.servers.links import CutError, Links, cut
from tests.servers.ports import free_port
from tests.servers.s3_faults import (
    CutRequest,
    CutResponse,
    DropWrite,
    Fault,
    HoldRequest,
    HoldResponse,
    LoseResponse,
    Refuse,
    Rule,
    SlowResponse,
    StripHeaders,
)
from tests.servers.s3_requests import S3Request, parse, renew_signature
from tests.servers.s3_server import S3Server

_CHUNK = 64 * 1024
_UPSTREAM_SECONDS = 120.0
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "expect",
}


class FaultyS3:
    """Forwards a port of 127.0.0.1 to an S3 server, but for the requests that meet a rule.

    Signatures stay valid: the Host header is forwarded as the client has sent it. A request meets the first rule that
    matches it; rules that strip headers apply besides.

    Attributes:
        port: Where it listens.
        requests: All that have been received, in order, whatever became of them.
    """

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self.port = free_port()
        self.requests: list[S3Request] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._listener = _Listener(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def endpoint_url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """As that of the server, but through the proxy."""
        return {**self.server.environment, "AWS_ENDPOINT_URL": self.endpoint_url}

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """How many requests there have been of each (method, kind)."""
        with self._lock:
            return Counter((request.method, request.kind) for request in self.requests)

    def client(self, **config: Any) -> Any:
        """The server's client, through the proxy."""
        return self.server.client(self.endpoint_url, **config)

    def on(
        self,
        fault: Fault,
        *,
        method: str | None = None,
        kind: str | None = None,
        query: str | None = None,
        key: str | None = None,
        times: int | None = 1,
    ) -> Rule:
        """Add a rule behind those there are."""
        rule = Rule(fault, method, kind, query, key, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Release and forget the rules, and the requests received."""
        with self._lock:
            rules, self._rules = self._rules, []
            self.requests.clear()
        for rule in rules:
            rule.release()

    def close(self) -> None:
        """Cut all connections and release every thread and socket."""
        self._listener.stop_listening()
        self.clear()
        self._listener.end()

    def _meet(self, request: S3Request) -> tuple[Rule | None, set[str]]:
        """The rule a request meets, and the headers it loses."""
        with self._lock:
            self.requests.append(request)
            stripped: set[str] = set()
            met: Rule | None = None
            for rule in [rule for rule in self._rules if rule.matches(request)]:
                if isinstance(rule.fault, StripHeaders):
                    stripped.update(name.lower() for name in rule.fault.names)
                elif met is None:
                    met = rule
                else:
                    continue
                rule.met += 1
        if met is not None and not isinstance(met.fault, HoldRequest | HoldResponse):
            met.reached.set()
        return met, stripped


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Listener(Links):
    """Knows whose it is."""

    def __init__(self, proxy: FaultyS3) -> None:
        self.proxy = proxy
        super().__init__(proxy.port, _Handler, "faulty-s3")


class _Handler(BaseHTTPRequestHandler):
    """One client's connection, and one to the server for each request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def handle_expect_100(self) -> bool:
        # Not yet: a request that is refused is refused before its body.
        return True

    def _handle(self) -> None:
        proxy = self.server.proxy
        request = parse(self.command, self.path, dict(self.headers.items()))
        rule, stripped = proxy._meet(request)
        try:
            if rule is not None and isinstance(rule.fault, Refuse):
                self._refuse(rule.fault)
            elif rule is not None and isinstance(rule.fault, DropWrite):
                self._acknowledge()
            else:
                self._forward(request, rule, stripped)
        except (CutError, OSError, http.client.HTTPException):
            self.close_connection = True
            cut(self.connection)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: the tests look at `FaultyS3.requests`."""

    def _forward(self, request: S3Request, rule: Rule | None, stripped: set[str]) -> None:
        fault = rule.fault if rule is not None else None
        if rule is not None and isinstance(fault, HoldRequest):
            self._hold(rule)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.proxy.server.port, timeout=_UPSTREAM_SECONDS)
        try:
            self._send(upstream, request, fault, stripped)
            answer = upstream.getresponse()
            if isinstance(fault, LoseResponse):
                answer.read()
                raise CutError
            self._answer(answer, rule)
        finally:
            upstream.close()

    def _hold(self, rule: Rule) -> None:
        rule.reached.set()
        rule.released.wait()
        if self.server.closing.is_set():
            raise CutError

    def _send(
        self, upstream: http.client.HTTPConnection, request: S3Request, fault: Fault | None, stripped: set[str]
    ) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP | stripped}
        if stripped & request.headers.keys():
            headers = renew_signature(request, self.path, headers, self.server.proxy.server.secret_key)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            upstream.putheader(name, value)
        chunked = self._is_chunked()
        if chunked:
            upstream.putheader("Transfer-Encoding", "chunked")
        upstream.endheaders()
        left = fault.after if isinstance(fault, CutRequest) else None
        for chunk in self._body():
            part = chunk if left is None else chunk[:left]
            if part:
                upstream.send(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            if left is not None:
                left -= len(part)
                if not left:
                    raise CutError
        if isinstance(fault, CutRequest):
            raise CutError
        if chunked:
            upstream.send(b"0\r\n\r\n")

    def _answer(self, answer: http.client.HTTPResponse, rule: Rule | None) -> None:
        fault = rule.fault if rule is not None else None
        bodiless = self.command == "HEAD" or answer.status in {204, 304}
        chunked = answer.getheader("Content-Length") is None and not bodiless
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if bodiless:
            return
        sent = 0
        for chunk in _pieces(answer, fault):
            if isinstance(fault, CutResponse) and sent == fault.after:
                raise CutError
            if rule is not None and isinstance(fault, HoldResponse) and sent == fault.after:
                self._hold(rule)
            if isinstance(fault, SlowResponse) and self.server.closing.wait(fault.seconds):
                raise CutError
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
            sent += len(chunk)
        length = answer.getheader("Content-Length")
        if isinstance(fault, CutResponse) or (length is not None and sent != int(length)):
            raise CutError  # told to, or the server died in the middle of its answer
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, fault: Refuse) -> None:
        if "Expect" not in self.headers:  # the body is on its way: unread, it would reset the connection
            for _ in self._body():
                pass
        body = f"<Error><Code>{fault.code}</Code><Message>a fault of the tests</Message></Error>"
        self.send_response_only(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if fault.retry_after is not None:
            self.send_header("Retry-After", str(fault.retry_after))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())
        self.close_connection = True

    def _acknowledge(self) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        for chunk in self._body():
            digest.update(chunk)
        self.send_response_only(200)
        self.send_header("ETag", f'"{digest.hexdigest()}"')
        for name, value in self.headers.items():
            if name.lower().startswith("x-amz-checksum-"):
                self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _is_chunked(self) -> bool:
        return "chunked" in self.headers.get("Transfer-Encoding", "").lower()

    def _body(self) -> Iterator[bytes]:
        """The request's body, without the framing of HTTP."""
        chunked = self._is_chunked()
        size = int(self.headers.get("Content-Length", "0"))
        if self.headers.get("Expect", "").lower() == "100-continue" and (chunked or size):
            self.send_response_only(100)
            self.end_headers()
        if not chunked:
            yield from _read(self.rfile, size)
            return
        while length := int(self.rfile.readline().split(b";")[0], 16):
            yield from _read(self.rfile, length)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass


def _pieces(answer: http.client.HTTPResponse, fault: Fault | None) -> Iterator[bytes]:
    """The answer's body, with a border where the fault has its place."""
    if isinstance(fault, CutResponse | HoldResponse) and fault.after:
        yield from _read(answer, fault.after)
    size = fault.chunk if isinstance(fault, SlowResponse) else _CHUNK
    while chunk := answer.read(size):
        yield chunk


def _read(source: _Readable, size: int) -> Iterator[bytes]:
    while size:
        chunk = source.read(min(size, _CHUNK))
        if not chunk:
            raise CutError
        size -= len(chunk)
        yield chunk
