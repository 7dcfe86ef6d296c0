"""`HttpService`: a service that is asked by HTTP; what of its answers may be tried again, and what must not be."""

import email.utils
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from djp_dagster.errors import (
    InvalidSettingError,
    LookupForbiddenError,
    LookupRefusedError,
    LookupUnavailableError,
)
from djp_dagster.lookups.lookup import Key
from djp_dagster.units import Duration, parse_seconds

if TYPE_CHECKING:
    import httpx

_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may be answered otherwise."""
_NOT_FOUND = frozenset({404, 410})
_WHO_ARE_YOU = frozenset({401, 403, 407})
_LONGEST_RETRY_AFTER_S = 3600.0
_OK = 300


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a service is, and what it takes.

    Args:
        base_url: e.g. ``"https://users.internal/v1"``.
        path: of one key; ``{key}`` stands for it.
        bulk_path: of many keys; None if there is none.
        bulk_method: ``"GET"`` with the keys as one parameter, joined by commas; ``"POST"`` with a JSON object.
        bulk_parameter: the parameter's, or the field's, name.
        bulk_key: the field of each object of a bulk answer that says whose it is; a bulk answer may also be an object
            by key.
        items: where in a bulk answer the objects are, if they are in a field of it.
        headers: of every request.
        token: a bearer token.
        timeout: of one call, from its beginning to its end of each read; connecting has the same.
    """

    base_url: str
    path: str = "/{key}"
    bulk_path: str | None = None
    bulk_method: str = "GET"
    bulk_parameter: str = "ids"
    bulk_key: str = "id"
    items: str | None = None
    headers: Mapping[str, str] = {}
    token: str | None = None
    timeout: Duration = 5.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InvalidSettingError(
                "base_url must begin with http:// or https://", setting="base_url", value=type(self.base_url).__name__
            )
        if "{key}" not in self.path:
            raise InvalidSettingError(
                f"path={self.path!r} must hold {{key}}, e.g. '/users/{{key}}'", setting="path", value=self.path
            )
        if self.bulk_method not in ("GET", "POST"):
            raise InvalidSettingError(
                f"bulk_method={self.bulk_method!r} must be 'GET' or 'POST'",
                setting="bulk_method",
                value=self.bulk_method,
            )


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
        headers = {"Accept": "application/json", **settings.headers}
        if settings.token is not None:
            headers["Authorization"] = f"Bearer {settings.token}"
        self._client = httpx.Client(
            base_url=settings.base_url,
            headers=headers,
            timeout=parse_seconds(settings.timeout, name="timeout"),
            transport=transport,
            limits=httpx.Limits(max_connections=None),
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def fetch(self, keys: Sequence[Key]) -> Mapping[Key, Any]:
        """The objects of those keys that the service knows.

        Raises:
            LookupUnavailableError: it did not answer, or says that it cannot for now.
            LookupRefusedError: it says that the request is wrong, or answers something else than agreed.
            LookupForbiddenError: it does not accept who asks.
        """
        if self._settings.bulk_path is not None and len(keys) > 1:
            return self._fetch_bulk(keys)
        answers = {key: self._fetch_one(key) for key in keys}
        return {key: answer for key, answer in answers.items() if answer is not None}

    def _fetch_one(self, key: Key) -> Any:
        path = self._settings.path.replace("{key}", quote(str(key), safe=""))
        response = self._send("GET", lambda: self._client.get(path))
        return None if response.status_code in _NOT_FOUND else self._json_of(response)

    def _fetch_bulk(self, keys: Sequence[Key]) -> Mapping[Key, Any]:
        settings = self._settings
        assert settings.bulk_path is not None
        path, name = settings.bulk_path, settings.bulk_parameter
        if settings.bulk_method == "GET":
            response = self._send("GET", lambda: self._client.get(path, params={name: ",".join(map(str, keys))}))
        else:
            # Reading: as harmless twice as once, whatever its method.
            response = self._send("POST", lambda: self._client.post(path, json={name: list(keys)}))
        if response.status_code in _NOT_FOUND:
            raise self._refused(response)
        body = self._json_of(response)
        if settings.items is not None:
            body = body.get(settings.items) if isinstance(body, dict) else None
        return self._by_key(keys, body, response)

    def _by_key(self, keys: Sequence[Key], body: Any, response: "httpx.Response") -> Mapping[Key, Any]:
        names = {str(key): key for key in keys}
        if isinstance(body, dict):
            return {names[name]: value for name, value in body.items() if name in names and value is not None}
        if isinstance(body, list) and all(isinstance(item, dict) and self._settings.bulk_key in item for item in body):
            found = ((str(item[self._settings.bulk_key]), item) for item in body)
            return {names[name]: item for name, item in found if name in names}
        raise LookupRefusedError(
            f"{self._name} answered {response.status_code} with something else than a JSON object by key, or a list of "
            f"objects with a field {self._settings.bulk_key!r}; see bulk_key and items",
            name=self._name,
        )

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
        response = self._send(method, lambda: self._client.request(method, path, json=body, headers=headers))
        if response.status_code in _NOT_FOUND:
            raise self._refused(response)
        return self._json_of(response) if response.content else None

    def _send(self, method: str, send: "Callable[[], httpx.Response]") -> "httpx.Response":
        import httpx

        try:
            response = send()
        except httpx.TransportError as error:
            # Its text may hold the URL with credentials in it: the kind says enough.
            raise LookupUnavailableError(
                f"{self._name} did not answer a {method}: {type(error).__name__}", name=self._name
            ) from None
        if response.status_code in _AGAIN:
            raise LookupUnavailableError(
                f"{self._name} answered {response.status_code}",
                name=self._name,
                status=response.status_code,
                retry_after_s=_retry_after_s(response.headers.get("Retry-After")),
            )
        if response.status_code >= _OK and response.status_code not in _NOT_FOUND:
            raise self._refused(response)
        return response

    def _refused(self, response: "httpx.Response") -> LookupRefusedError | LookupForbiddenError:
        what = f"{self._name} answered {response.status_code} to {response.request.method} {response.request.url.path}"
        if response.status_code in _WHO_ARE_YOU:
            return LookupForbiddenError(
                f"{what}: it does not accept who asks; check the token or the headers",
                name=self._name,
                status=response.status_code,
            )
        return LookupRefusedError(
            f"{what}: it takes the request for wrong", name=self._name, status=response.status_code
        )

    def _json_of(self, response: "httpx.Response") -> Any:
        try:
            return msgspec.json.decode(response.content)
        except msgspec.DecodeError as error:
            raise LookupRefusedError(
                f"{self._name} answered {response.status_code} with something that is no JSON: {error}", name=self._name
            ) from None


def _retry_after_s(header: str | None) -> float:
    """Seconds, whether the header has a number or a date; 0 if it has neither."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S)
