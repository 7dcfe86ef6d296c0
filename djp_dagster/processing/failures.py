"""What an error means: try again, look for the record at fault, or stop."""

import random
from typing import Literal

import msgspec

from djp_dagster.errors import (
    CommitTooLargeError,
    DjpError,
    FencedError,
    InvalidSettingError,
    OffsetOutOfRangeError,
    PoisonBlockedError,
    StateMismatchError,
    StreamBusyError,
    StreamCorruptError,
    StreamFormatError,
    StreamFullError,
    StreamNotWritableError,
    StreamReplacedError,
    StreamUnavailableError,
    SystemicFailureError,
)
from djp_dagster.units import Duration, parse_seconds

Verdict = Literal["outage", "fatal", "transient", "terminal"]

OUTAGES = (StreamUnavailableError, StreamBusyError, StreamFullError)
"""The stream is away for now: waited for, counted nowhere."""

FATAL = (
    FencedError,
    OffsetOutOfRangeError,
    StreamCorruptError,
    StreamFormatError,
    StreamReplacedError,
    StreamNotWritableError,
    StateMismatchError,
    CommitTooLargeError,
    InvalidSettingError,
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
    text = str(error)
    return type(error).__qualname__, text if len(text) <= limit else text[: limit - 3] + "..."
