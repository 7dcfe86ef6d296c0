"""What can happen to a request on its way to an S3 server and back, and to which requests it does."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from tests.servers.s3_requests import S3Request


@dataclass(frozen=True)
class Refuse:
    """Answer with an error, and do not forward the request."""

    status: int = 503
    code: str = "SlowDown"
    retry_after: int | None = None


@dataclass(frozen=True)
class CutRequest:
    """Forward so many bytes of the request's body, then cut both connections."""

    after: int = 0


@dataclass(frozen=True)
class CutResponse:
    """Answer with the headers and so many bytes of the body, then cut the connection."""

    after: int = 0


@dataclass(frozen=True)
class LoseResponse:
    """Forward the request, let the server do it, and cut the connection instead of answering."""


@dataclass(frozen=True)
class SlowResponse:
    """Send the body in pieces of ``chunk`` bytes, and wait before each of them."""

    seconds: float
    chunk: int = 64 * 1024


@dataclass(frozen=True)
class HoldRequest:
    """Keep the request back until `Rule.release`; it has not reached the server then."""


@dataclass(frozen=True)
class HoldResponse:
    """Send so many bytes of the body, and the rest after `Rule.release`."""

    after: int = 0


@dataclass(frozen=True)
class DropWrite:
    """Answer 200 with the ETag that the body has, and do not forward: a store that acknowledges and loses."""


@dataclass(frozen=True)
class StripHeaders:
    """Forward without these headers, as a store does that ignores them; the request is signed again."""

    names: tuple[str, ...] = ("If-None-Match", "If-Match")


Fault = (
    Refuse
    | CutRequest
    | CutResponse
    | LoseResponse
    | SlowResponse
    | HoldRequest
    | HoldResponse
    | DropWrite
    | StripHeaders
)


@dataclass(eq=False)
class Rule:
    """A fault, and the requests that meet it. What is not given matches everything.

    Attributes:
        kind: The operation, as in `S3Request`.
        query: A part of the query, such as ``partNumber=2``, as a whole parameter.
        key: A part of the object's key.
        times: How many requests meet the fault; None for all.
        met: How many have.
        reached: Set when one has: a held request or response is held now.
    """

    fault: Fault
    method: str | None = None
    kind: str | None = None
    query: str | None = None
    key: str | None = None
    times: int | None = 1
    met: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def matches(self, request: S3Request) -> bool:
        """Whether the request meets the fault."""
        return (
            (self.times is None or self.met < self.times)
            and self.method in {None, request.method}
            and self.kind in {None, request.kind}
            and (self.query is None or f"&{self.query}&" in f"&{request.query}&")
            and (self.key is None or self.key in request.key)
        )

    def release(self) -> None:
        """Let everything go on that this rule holds, now and later."""
        self.released.set()
