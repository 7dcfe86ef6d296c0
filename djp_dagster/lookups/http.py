"""`HttpService`: a service that is asked by HTTP; what of its answers may be tried again, and what must not be.

Credentials are in headers, or in ``base_url``; errors, logs and representations show neither. They name the method and
the path below ``base_url``, without its query.
"""

import email.utils
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

import msgspec

from djp_dagster.errors import (
    InvalidSettingError,
    LookupForbiddenError,
    LookupRefusedError,
    LookupUnavailableError,
)
from djp_dagster.lookups.gathering import Key
from djp_dagster.units import Duration, Size, parse_bytes, parse_seconds

if TYPE_CHECKING:
    import httpx

_AGAIN = frozenset({408, 425, 429})
"""With what is above 500: answers after which the same request may be answered otherwise."""
_NEVER = frozenset({501, 505})
_NOT_FOUND = frozenset({404, 410})
_WHO_ARE_YOU = frozenset({401, 403, 407})
_NOTHING, _OK, _WRONG, _CONFLICT, _BROKEN = 204, 300, 400, 409, 500
_LONGEST_RETRY_AFTER_S = 3600.0
_LONGEST_URL = 4000
"""Some servers take no more than 4094 bytes in the first line of a request."""
_SHORTEST_S = 0.001
_LITTLE = 1 << 16
_LOGGERS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """Where a service is, and what it takes.

    Args:
        base_url: e.g. ``"https://users.internal/v1"``; with a user and a password, if it wants these.
        path: of one key; ``{key}`` stands for it. Without it, ``bulk_path`` is asked for one key, too; without that as
            well, it is ``"/{key}"``.
        bulk_path: of many keys; None if there is none.
        bulk_method: ``"GET"`` with the keys as one parameter, joined by commas; ``"POST"`` with a JSON object.
        bulk_parameter: the parameter's, or the field's, name.
        bulk_key: the field of each object of a bulk answer that says whose it is; a bulk answer may also be an object
            by key.
        items: where in a bulk answer the objects are, if they are in a field of it.
        headers: of every request.
        token: a bearer token.
        timeout: of one call as a whole. A server that trickles may take up to twice as long.
        max_bytes: of one answer.

    Raises:
        InvalidSettingError: naming the setting and what is allowed, and nothing that may be secret.
    """

    base_url: str
    path: str | None = None
    bulk_path: str | None = None
    bulk_method: str = "GET"
    bulk_parameter: str = "ids"
    bulk_key: str = "id"
    items: str | None = None
    headers: Mapping[str, str] = {}
    token: str | None = None
    timeout: Duration = 5.0
    max_bytes: Size = "64MiB"

    def __post_init__(self) -> None:
        url = _split(self.base_url)
        whole = url is not None and url.scheme in ("http", "https") and bool(url.hostname)
        _require(whole, "base_url", "begin with http:// or https:// and a host")
        _require(not url.query and not url.fragment, "base_url", "have no query; put it into path and bulk_path")
        _require(not (url.username and self.token), "token", "not be given beside a user in base_url")
        _require(self.path is None or "{key}" in self.path, "path", "hold {key}, e.g. '/users/{key}'")
        _require(self.bulk_method in ("GET", "POST"), "bulk_method", "be 'GET' or 'POST'")
        _require(self.token is None or _is_sendable(self.token), "token", "be printable ASCII, and not empty")
        for name, value in self.headers.items():
            _require(_is_sendable(name) and _is_sendable(value), "headers", "be printable ASCII, and not empty")
        _require(parse_seconds(self.timeout, name="timeout") > 0, "timeout", "be above 0")
        parse_bytes(self.max_bytes, name="max_bytes")

    def __repr__(self) -> str:
        return f"HttpSettings({service_name(self.base_url)!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("base_url", service_name(self.base_url))]


def service_name(base_url: str) -> str:
    """The host, and the port if there is one: what errors and logs call it."""
    url = _split(base_url)
    if url is None or url.hostname is None:
        return "?"
    return url.hostname if url.port is None else f"{url.hostname}:{url.port}"


def _split(base_url: str) -> Any:
    """None if it is no URL."""
    try:
        url = urlsplit(base_url)
        url.port  # noqa: B018
    except ValueError:
        return None
    return url


def _is_sendable(text: str) -> bool:
    """Whether a header can hold it: else every call would fail, and the error would show it."""
    return text.isascii() and text.isprintable() and text.strip() == text != ""


def _require(holds: bool, setting: str, remedy: str) -> None:
    if not holds:
        # Not its value: it may be a secret, or hold one.
        raise InvalidSettingError(f"{setting} of an HTTP look-up must {remedy}", setting=setting, value="(not shown)")


class _Answer(NamedTuple):
    what: str
    status: int
    body: bytes


class HttpService:
    """Asks a service by HTTP. Safe to share between threads; close it after use.

    Args:
        name: for errors; they never show headers, tokens, or bodies.
        settings: where it is, and what it takes.
        transport: for tests.
    """

    def __init__(self, name: str, settings: HttpSettings, *, transport: "httpx.BaseTransport | None" = None) -> None:
        import httpx

        self._name, self._settings = name, settings
        self._timeout_s = parse_seconds(settings.timeout, name="timeout")
        self._max_bytes = parse_bytes(settings.max_bytes, name="max_bytes")
        self._path = "/{key}" if settings.path is None and settings.bulk_path is None else settings.path
        headers = {"Accept": "application/json", **settings.headers}
        if settings.token is not None:
            headers["Authorization"] = f"Bearer {settings.token}"
        url = httpx.URL(settings.base_url)
        self._client = httpx.Client(
            base_url=url.copy_with(userinfo=b""),
            auth=(url.username, url.password) if url.userinfo else None,
            headers=headers,
            transport=transport,
            limits=httpx.Limits(max_connections=None),
        )
        for logger in _LOGGERS:
            logging.getLogger(logger).addFilter(_hush)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def fitting(self, keys: Sequence[Key]) -> int:
        """How many of the first of these keys fit into one call."""
        settings = self._settings
        if settings.bulk_path is None:
            return 1
        if settings.bulk_method == "POST":
            return len(keys)
        left = _LONGEST_URL - len(settings.base_url) - len(settings.bulk_path) - len(settings.bulk_parameter)
        for number, key in enumerate(keys):
            left -= len(_quoted(key)) + 1
            if number and (left < 0 or not _can_be_joined(key)):
                return number
            if not _can_be_joined(key):
                return 1
        return len(keys)

    def fetch(self, keys: Sequence[Key]) -> Mapping[Key, Any]:
        """The objects of those keys that the service knows.

        Raises:
            LookupUnavailableError: it did not answer, or says that it cannot for now.
            LookupRefusedError: it says that the request is wrong, or answers something else than agreed; or a key
                cannot be said.
            LookupForbiddenError: it does not accept who asks.
        """
        if self._settings.bulk_path is not None and (len(keys) > 1 or self._path is None):
            return self._fetch_bulk(keys, self._settings.bulk_path)
        answers = {key: self._fetch_one(key) for key in keys}
        return {key: answer for key, answer in answers.items() if answer is not None}

    def _fetch_one(self, key: Key) -> Any:
        assert self._path is not None
        segments = self._path.partition("?")[0].split("/")
        if any("{key}" in part and part.replace("{key}", str(key)) in ("", ".", "..") for part in segments):
            raise self._unspeakable(key, "it would name another path")
        answer = self._send("GET", self._path.replace("{key}", _quoted(key)))
        return None if answer.status in _NOT_FOUND else self._json_of(answer)

    def _fetch_bulk(self, keys: Sequence[Key], path: str) -> Mapping[Key, Any]:
        settings = self._settings
        if settings.bulk_method == "GET":
            for key in keys:
                if not _can_be_joined(key):
                    raise self._unspeakable(key, "keys are joined by commas; set path, or bulk_method='POST'")
            query = f"{quote(settings.bulk_parameter)}={','.join(map(_quoted, keys))}"
            answer = self._send("GET", f"{path}{'&' if '?' in path else '?'}{query}")
        else:
            # Reading: as harmless twice as once, whatever its method.
            answer = self._send("POST", path, {settings.bulk_parameter: list(keys)})
        if answer.status in _NOT_FOUND:
            raise self._refused(answer)
        body = self._json_of(answer)
        if settings.items is not None and isinstance(body, dict):
            body = body.get(settings.items, ())
        return {} if body is None else self._by_key(keys, body, answer)

    def _by_key(self, keys: Sequence[Key], body: Any, answer: _Answer) -> Mapping[Key, Any]:
        names: dict[str, list[Key]] = {}
        for key in keys:
            names.setdefault(str(key), []).append(key)
        if isinstance(body, dict):
            found = body
            strange = bool(body) and not names.keys() & body.keys()
        elif isinstance(body, list) and all(isinstance(one, dict) and self._settings.bulk_key in one for one in body):
            found = {str(item[self._settings.bulk_key]): item for item in body}
            strange = bool(found.keys() - names.keys())
        else:
            raise self._nonsense(
                answer,
                f"is neither a JSON object by key, nor a list of objects with a field {self._settings.bulk_key!r}",
            )
        if strange:
            # It has not understood what it was asked: what is missing may be there.
            raise self._nonsense(answer, "holds what was not asked for, check bulk_parameter")
        return {key: found[name] for name in names if found.get(name) is not None for key in names[name]}

    def write(self, method: str, path: str, body: Any, *, idempotency_key: str | None = None) -> Any:
        """Send a request that changes something; the JSON it answers, or None.

        Args:
            method: ``"POST"``, ``"PUT"``, ``"PATCH"`` or ``"DELETE"``.
            path: below ``base_url``.
            body: sent as JSON.
            idempotency_key: sent as ``Idempotency-Key``; a service that honours it does the same thing once.

        Raises:
            LookupUnavailableError, LookupRefusedError: as `fetch`.
        """
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        answer = self._send(method, path, body, headers)
        if answer.status in _NOT_FOUND:
            raise self._refused(answer)
        return self._json_of(answer) if answer.body else None

    def _send(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> _Answer:
        """The answer, if it is a good one, or that there is nothing."""
        import httpx

        below = "/" + path.lstrip("/")  # always below base_url, whatever it looks like
        bare, left = below.partition("?")[0], _TimeLeft(self._timeout_s)
        what = f"{method} {bare}"
        if not {".", ".."}.isdisjoint(bare.split("/")):
            raise LookupRefusedError(
                f"{self._name} is not asked for {what}: it would name another path", name=self._name
            )
        try:
            extensions = {"timeout": left}
            request = self._client.build_request(method, below, json=body, headers=headers, extensions=extensions)
            with _quietly(), closing(self._client.send(request, stream=True)) as response:
                return self._answer(what, response, left)
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.DecodingError) as error:
            failure, transient, sent = type(error).__name__, False, True
        except httpx.TransportError as error:
            failure, transient = type(error).__name__, True
            sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        # Not while those are handled: their requests hold the URL and the headers, and their texts may.
        if transient:
            raise LookupUnavailableError(f"{self._name} did not answer {what}: {failure}", name=self._name, sent=sent)
        raise LookupRefusedError(f"{self._name} and {what} do not go together: {failure}", name=self._name)

    def _answer(self, what: str, response: "httpx.Response", left: "_TimeLeft") -> _Answer:
        status = response.status_code
        if status < _OK or status in _NOT_FOUND:
            return _Answer(what, status, self._body_of(response, left, what))
        _read_a_little(response, left)
        if status in _AGAIN or (status >= _BROKEN and status not in _NEVER):
            raise LookupUnavailableError(
                f"{self._name} answered {status} to {what}",
                name=self._name,
                status=status,
                retry_after_s=_retry_after_s(response.headers.get("Retry-After")),
            )
        has_key = "Idempotency-Key" in response.request.headers
        raise self._refused(_Answer(what, status, b""), again=has_key and status == _CONFLICT)

    def _body_of(self, response: "httpx.Response", left: "_TimeLeft", what: str) -> bytes:
        """The body, whole, unless it is too large or takes too long."""
        pieces, size = [], 0
        for piece in response.iter_bytes():
            size += len(piece)
            if size > self._max_bytes:
                raise LookupRefusedError(
                    f"{self._name} answers {what} with more than max_bytes={self._max_bytes}", name=self._name
                )
            if left.is_over:
                raise LookupUnavailableError(
                    f"{self._name} did not answer {what} to its end within {self._timeout_s:g} s", name=self._name
                )
            pieces.append(piece)
        return b"".join(pieces)

    def _refused(self, answer: _Answer, *, again: bool = False) -> LookupRefusedError | LookupForbiddenError:
        what = f"{self._name} answered {answer.status} to {answer.what}"
        if answer.status in _WHO_ARE_YOU:
            return LookupForbiddenError(
                f"{what}: it does not accept who asks; check the token or the headers",
                name=self._name,
                status=answer.status,
            )
        why = "it takes the request for wrong"
        if answer.status < _WRONG:
            why = "redirects are not followed, so that credentials go nowhere else; set base_url to where it is"
        # With a key: the first try may still be at work.
        return LookupRefusedError(f"{what}: {why}", name=self._name, status=answer.status, again=again)

    def _unspeakable(self, key: Key, why: str) -> LookupRefusedError:
        return LookupRefusedError(f"{self._name} cannot be asked for key {key!r}: {why}", name=self._name, key=key)

    def _nonsense(self, answer: _Answer, why: str) -> LookupRefusedError:
        return LookupRefusedError(
            f"what {self._name} answered to {answer.what} ({answer.status}) {why}; see bulk_key and items",
            name=self._name,
            status=answer.status,
        )

    def _json_of(self, answer: _Answer) -> Any:
        """The JSON of the body; None if the answer is that there is none."""
        if answer.status == _NOTHING:
            return None
        try:
            return msgspec.json.decode(answer.body)
        except msgspec.DecodeError as error:
            raise LookupRefusedError(
                f"what {self._name} answered to {answer.what} ({answer.status}) is no JSON: {error}",
                name=self._name,
                status=answer.status,
            ) from None


class _TimeLeft(dict[str, float]):
    """The time-outs of a request, for httpx, which asks for each when it comes to it: what is left of the whole."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._until = time.monotonic() + seconds

    def get(self, _: str, default: Any = None) -> float:
        """Seconds left; never so few that they mean not to wait at all."""
        return max(self._until - time.monotonic(), _SHORTEST_S)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left."""
        return time.monotonic() > self._until


def _read_a_little(response: "httpx.Response", left: _TimeLeft) -> None:
    """A connection whose answer has been read can be used again; what an error says more, nobody wants to know."""
    import httpx

    size = 0
    with suppress(httpx.TransportError):
        for piece in response.iter_raw():
            size += len(piece)
            if size > _LITTLE or left.is_over:
                return


def _quoted(key: Key) -> str:
    return quote(str(key), safe="")


def _can_be_joined(key: Key) -> bool:
    """Whether the key can be told from its neighbours in a list with commas."""
    return key != "" and "," not in str(key)


def _retry_after_s(header: str | None) -> float:
    """Seconds, whether the header has a number or a date; 0 if it has neither."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S)


_here = threading.local()


@contextmanager
def _quietly() -> Iterator[None]:
    """Within the block this thread's requests are not logged: URLs and the headers of answers hold what is secret."""
    _here.quiet = True
    try:
        yield
    finally:
        _here.quiet = False


class _Hush(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        return record.levelno > logging.INFO or not getattr(_here, "quiet", False)


_hush = _Hush()
