"""Stateless worker: the event brings an id, and a service has the rest.

A handler takes a look-up as a resource, and asks it for a whole batch at once. It is always as new as the service, and
it depends on it; a `djp_dagster.Table` is the other way. Look-ups are Dagster resources: of a service by HTTP, or of
anything, by a method of your own.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg
import msgspec
from pydantic import Field, PrivateAttr

from djp_dagster.lookups.gathering import Key
from djp_dagster.lookups.http import HttpService, HttpSettings, service_name
from djp_dagster.lookups.lookup import Lookup, LookupPolicy


class LookupResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Values by key, asked of a service for a whole batch at once: give it a ``fetch_many`` of your own.

    Keys are asked for once each, in bulk, with bounded concurrency, retries, a breaker, a rate limit, and without a
    cache unless asked for; see `djp_dagster.lookups`. A service that is away raises `LookupUnavailableError`, which is
    transient; a key it does not know is missing in the answer.

    Example:
        >>> import djp_dagster as djp
        >>> class Names(djp.LookupResource):
        ...     def fetch_many(self, keys):
        ...         return {key: f"name of {key}" for key in keys}
        >>> Names().get_many([1, 2])
        {1: 'name of 1', 2: 'name of 2'}
    """

    bulk_size: int = Field(default=100, description="How many keys one call takes.")
    max_concurrency: int = Field(default=8, description="How many calls are under way at the same time.")
    attempts: int = Field(default=4, description="How often a call is tried in all.")
    first_pause: str = Field(default="200ms", description="Before the second try; longer before each further one.")
    longest_pause: str = Field(default="10s", description="Before any try; what the service asks for is added.")
    give_up_after: str = Field(default="60s", description="No pause is begun that would end later than this.")
    rate_limit: float | None = Field(default=None, description="So many calls at most begin in any second.")
    breaker_failures: int = Field(default=10, description="So many failures in a row, and nobody calls for a while.")
    breaker_reset: str = Field(default="15s", description="After so long it is tried again.")
    cache_ttl: str | None = Field(
        default=None, description="How long an answer may be used again; without it, the service is always asked."
    )
    cache_size: int = Field(default=10_000, description="How many answers are kept.")

    _lookup: Lookup | None = PrivateAttr(default=None)
    _opening: Any = PrivateAttr(default_factory=threading.RLock)

    def __copy__(self) -> "LookupResource":
        """Another one, which opens what it needs: it may be given other settings."""
        copied: LookupResource = super().__copy__()
        copied._forget()
        return copied

    def _forget(self) -> None:
        self._lookup, self._opening = None, threading.RLock()

    def fetch_many(self, keys: Sequence[Key]) -> Mapping[Key, Any]:
        """Ask for at most ``bulk_size`` different keys; those it does not know are missing in the answer.

        Raise `LookupUnavailableError` for what may be tried again; an `OSError`, which covers the standard library's
        connections and time-outs, is taken for one. Everything else is taken for a fault of what was asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method fetch_many(keys)")

    def get(self, key: Key, default: Any = None) -> Any:
        """The value of ``key``, or ``default``; see `Lookup.get`."""
        return self.lookup.get(key, default)

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The values of those keys that the service knows; see `Lookup.get_many`."""
        return self.lookup.get_many(keys)

    @property
    def lookup(self) -> Lookup:
        """What makes the calls; opened when first used."""
        with self._opening:
            if self._lookup is None:
                self._lookup = self._made()
            return self._lookup

    def _made(self) -> Lookup:
        return Lookup(type(self).__name__, self.fetch_many, self._policy())

    def _policy(self) -> LookupPolicy:
        return LookupPolicy(**{name: getattr(self, name) for name in LookupPolicy.__struct_fields__})

    def take_figures(self) -> tuple[dict[str, int], dict[str, float]]:
        """What it has done since the last time; see `Figures.take`."""
        return self.lookup.figures.take()

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Refuse wrong settings now, and not when the first event comes."""
        self._policy()

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Close what was opened."""
        self.close()

    def close(self) -> None:
        """Close what was opened; the next use opens it again."""
        with self._opening:
            lookup, self._lookup = self._lookup, None
        if lookup is not None:
            lookup.close()


class HttpLookup(LookupResource):
    """Values by key from a service that is asked by HTTP and answers JSON; reads are retried, writes only with a key.

    Example:
        >>> users = HttpLookup(base_url="https://users.internal", path="/users/{key}", bulk_path="/users")
        >>> users.bulk_size
        100
    """

    base_url: str = Field(description='Where the service is, e.g. "https://users.internal/v1".', repr=False)
    path: str | None = Field(default=None, description='Of one key, e.g. "/users/{key}".')
    bulk_path: str | None = Field(default=None, description="Of many keys; without it, each key is a call.")
    bulk_method: str = Field(default="GET", description='"GET": keys as a parameter, with commas; "POST": as JSON.')
    bulk_parameter: str = Field(default="ids", description="The name of that parameter, or field.")
    bulk_key: str = Field(default="id", description="The field of each object that says whose it is.")
    items: str | None = Field(default=None, description="The field of a bulk answer that holds the objects.")
    headers: dict[str, str] = Field(default={}, description="Of every request.", repr=False)
    token: str | None = Field(default=None, description="A bearer token; use dg.EnvVar.", repr=False)
    timeout: str = Field(default="5s", description="Of one call, from its beginning to its end.")
    max_bytes: str = Field(default="64MiB", description="Of one answer at most.")

    _service: HttpService | None = PrivateAttr(default=None)

    def fetch_many(self, keys: Sequence[Key]) -> Mapping[Key, Any]:
        """See `HttpService.fetch`."""
        return self.service.fetch(keys)

    def write(self, method: str, path: str, body: Any, *, idempotency_key: str | None = None) -> Any:
        """Send a request that changes something; tried again only with an ``idempotency_key``, or if nothing was sent.

        ``record.idempotency_key`` is one: the same at every attempt at the same record.

        Raises:
            LookupUnavailableError, LookupRefusedError: as `HttpService.write`.
        """
        return self.lookup.attempt(
            lambda: self.service.write(method, path, body, idempotency_key=idempotency_key),
            may_repeat=idempotency_key is not None,
        )

    @property
    def service(self) -> HttpService:
        """The open connections."""
        with self._opening:
            if self._service is None:
                self._service = HttpService(service_name(self.base_url), self._settings())
            return self._service

    def _settings(self) -> HttpSettings:
        return HttpSettings(**{name: getattr(self, name) for name in HttpSettings.__struct_fields__})

    def _made(self) -> Lookup:
        return Lookup(service_name(self.base_url), self.fetch_many, self._policy(), fitting=self.service.fitting)

    def _policy(self) -> LookupPolicy:
        policy = super()._policy()
        # A call for each key: so that they are made at the same time.
        return policy if self.bulk_path is not None else msgspec.structs.replace(policy, bulk_size=1)

    def _forget(self) -> None:
        super()._forget()
        self._service = None

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Refuse wrong settings now, and not when the first event comes."""
        super().setup_for_execution(context)
        self._settings()

    def close(self) -> None:
        """Close what was opened; the next use opens it again."""
        super().close()
        with self._opening:
            service, self._service = self._service, None
        if service is not None:
            service.close()
