"""What an error means: try again, look for the record at fault, or stop."""

import logging
import random
import threading
import time
from typing import Literal

import msgspec

from djp_dagster.errors import (
    CommitTooLargeError,
    DjpError,
    FencedError,
    InvalidSettingError,
    LookupForbiddenError,
    OffsetOutOfRangeError,
    PayloadStoreRefusedError,
    PayloadStoreUnavailableError,
    PoisonBlockedError,
    StateLostError,
    StreamBusyError,
    StreamCorruptError,
    StreamFailedError,
    StreamFormatError,
    StreamFullError,
    StreamNotWritableError,
    StreamReplacedError,
    StreamUnavailableError,
    SystemicFailureError,
)
from djp_dagster.streams.model import Poison
from djp_dagster.units import Duration, parse_seconds

_log = logging.getLogger(__name__)
Verdict = Literal["outage", "fatal", "transient", "terminal"]

OUTAGES = (StreamUnavailableError, StreamBusyError, StreamFullError, PayloadStoreUnavailableError)
"""The stream, or a payload store, is away for now: waited for, counted nowhere."""

FATAL = (
    FencedError,
    OffsetOutOfRangeError,
    StateLostError,
    StreamCorruptError,
    StreamFailedError,
    StreamFormatError,
    StreamReplacedError,
    StreamNotWritableError,
    CommitTooLargeError,
    InvalidSettingError,
    LookupForbiddenError,
    PayloadStoreRefusedError,
    PoisonBlockedError,
    SystemicFailureError,
)
"""No record is at fault: stop, and dead-letter nothing."""


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often, and how patiently, a failing batch is tried again.

    The pause before attempt *n* is drawn at random between half and the whole of ``min(first * 2**(n-1), longest)``.

    Args:
        max_attempts: failures (or deaths of the process) in a row until the run gives up, at least 1.
        first, longest: the shortest and the longest pause.
        transient: further exception types to treat as transient. `TransientError`, `OSError` (which covers connection
            and time-out errors) and `TimeoutError` always are; everything else is terminal.
    """

    max_attempts: int = 5
    first: Duration = 0.2
    longest: Duration = 30.0
    transient: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        given: object = self.transient
        named: tuple[object, ...] = tuple(given) if isinstance(given, tuple | list) else (given,)
        if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in named):
            raise InvalidSettingError(
                f"RetryPolicy(transient={self.transient!r}) must be exception types, e.g. (ValueError,)",
                setting="transient",
                value=repr(self.transient),
            )
        msgspec.structs.force_setattr(self, "transient", named)
        if self.max_attempts < 1:
            raise InvalidSettingError(
                f"RetryPolicy(max_attempts={self.max_attempts}) must be at least 1",
                setting="max_attempts",
                value=self.max_attempts,
            )
        parse_seconds(self.first, name="first")
        parse_seconds(self.longest, name="longest")

    def pause_s(self, failures: int) -> float:
        """The pause after that many failures."""
        longest: float = min(
            parse_seconds(self.first) * 2.0 ** min(max(failures - 1, 0), 64),
            parse_seconds(self.longest),
        )
        return longest * random.uniform(0.5, 1.0)  # noqa: S311

    def judge(self, error: BaseException) -> Verdict:
        """What an error out of a handler, or out of reading for it, means."""
        if isinstance(error, OUTAGES):
            return "outage"
        if isinstance(error, FATAL):
            return "fatal"
        if isinstance(error, DjpError):
            return "transient" if error.transient else "terminal"
        if isinstance(error, (OSError, TimeoutError, *self.transient)):
            return "transient"
        return "terminal"


def describe(error: BaseException, *, limit: int = 2000) -> tuple[str, str]:
    """The error's type and text, short enough to store."""
    text = str(error).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return type(error).__qualname__, text if len(text) <= limit else text[: limit - 3] + "..."


class HandlerError(Exception):
    """The handler failed, transiently or terminally; never leaves `djp_dagster.processing`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Patience:
    """Waiting that ends early when told to stop, and gives an outage only so long.

    Args:
        stop: ends all waiting.
        outage: how long an outage of the stream is waited for.
    """

    _QUIET_S = 60.0  # an outage after this long without one is another one
    _LONGEST_S = 60.0  # a clock that went back must not make anybody wait for it

    def __init__(self, stop: threading.Event, outage: Duration) -> None:
        self._stop, self._outage_s = stop, parse_seconds(outage, name="patience")
        self._away_since: float | None = None
        self._last = 0.0

    def pause(self, seconds: float) -> None:
        """Wait, if there is anything to wait for."""
        if seconds > 0:
            self._stop.wait(min(seconds, self._LONGEST_S))

    def wait_out(self, error: DjpError) -> None:
        """Wait a little for the stream to come back; raise ``error`` if it has been away for too long."""
        now = time.monotonic()
        if self._away_since is None or now - self._last > self._QUIET_S:
            self._away_since = now
        self._last = now
        if self._stop.is_set() or now - self._away_since > self._outage_s:
            raise error
        _log.warning("waiting: %s", error)
        self.pause(0.5)

    def came_back(self) -> None:
        """The stream has answered: the next outage is another one."""
        self._away_since = None


def systemic(group: str, max_poison: int, batch_id: str, count: int, error_type: str, error: str) -> DjpError:
    """More poison than the group may skip."""
    return SystemicFailureError(
        f"batch {batch_id} of group {group!r} fails beyond {count} poison records (max_poison={max_poison}), last with "
        f"{error_type}: {error}; nothing was dead-lettered. Fix the handler or what it depends on, or raise max_poison",
        batch_id=batch_id,
        group=group,
        error_type=error_type,
    )


def blocked(group: str, found: Poison) -> DjpError:
    """Poison in a group that must not skip."""
    return PoisonBlockedError(
        f"group {group!r} stops at record {found.offset} of topic {found.topic!r} partition {found.partition}, which "
        f"fails with {found.error_type}: {found.error}; fix the handler, or skip the record with stream.seek",
        group=group,
        position=found.position,
    )
