"""`Gathering`: keys that threads ask for one by one share calls.

While enough calls are under way, keys are gathered; when one of these ends, what has been gathered is asked for. The
first of those who gather **leads**: it waits, makes the calls, and tells all who wait. Its death must not be theirs:

* *It is interrupted while it waits or calls:* they get a `LookupUnavailableError`, and whoever asks next leads.
* *A call cannot be begun,* because the look-up was closed: likewise.
* *The service refuses a call:* one of its keys may be at fault, so each half is asked again, down to single keys. What
  one event brings takes nothing with it.

Who asks for a key joins only a call that has not begun: an answer was given after it was asked for.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from djp_dagster.errors import DjpError, InvalidSettingError, LookupForbiddenError, LookupUnavailableError

Key = str | int
ABSENT = object()
"""The value of a key that the service does not know."""
_Promised = dict[Key, "Future[Any]"]


class Gathering:
    """Makes calls for keys that are asked for one by one. Safe to share between threads.

    Args:
        name: of the service, for errors.
        ask: makes one call, and returns the values of the keys that the service knows.
        divide: the keys of each call.
        submit: calls a function in another thread.
        at_once: with so many calls under way, keys wait for one to end.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[[list[Key]], Mapping[Key, Any]],
        divide: Callable[[list[Key]], list[list[Key]]],
        submit: Callable[..., Any],
        at_once: int,
    ) -> None:
        self._name, self._ask, self._divide, self._submit, self._at_once = name, ask, divide, submit, at_once
        self._ended = threading.Condition()
        self._promised: _Promised = {}
        self._under_way = 0

    def get(self, key: Key) -> Any:
        """The value of ``key``, or `ABSENT`.

        Raises:
            Exception: what the call raised.
        """
        with self._ended:
            leads = not self._promised
            mine = self._promised.setdefault(key, Future())
        if leads:
            self._lead()
        return mine.result()

    def _lead(self) -> None:
        promised, pieces = self._gathered()
        begun = 0
        try:
            for piece in pieces[:-1]:
                self._submit(self._serve, piece, promised)
                begun += 1
            begun += 1
            self._serve(pieces[-1], promised)
        except BaseException as error:
            for piece in pieces[begun:]:
                self._break(piece, promised, error)
                self._end()
            raise

    def _gathered(self) -> tuple[_Promised, list[list[Key]]]:
        """Wait until a call may begin; then all that has been asked for, and the calls it makes."""
        promised: _Promised = {}
        try:
            with self._ended:
                try:
                    self._ended.wait_for(lambda: self._under_way < self._at_once)
                finally:
                    promised, self._promised = self._promised, {}
                pieces = self._divide(list(promised))
                self._under_way += len(pieces)
        except BaseException as error:
            self._break(list(promised), promised, error)
            raise
        return promised, pieces

    def _serve(self, keys: list[Key], promised: _Promised) -> None:
        """Make one call, and tell all who wait for it."""
        try:
            self._tell(keys, promised)
        except BaseException as error:
            self._break(keys, promised, error)
            raise
        finally:
            self._end()

    def _tell(self, keys: list[Key], promised: _Promised) -> None:
        answer: Mapping[Key, Any] = {}
        failed: Exception | None = None
        try:
            answer = self._ask(keys)
        except Exception as error:  # noqa: BLE001
            failed = error
        if failed is None:
            for key in keys:
                promised[key].set_result(answer.get(key, ABSENT))
        elif len(keys) > 1 and _may_be_one_of_them(failed):
            middle = len(keys) // 2
            self._tell(keys[:middle], promised)
            self._tell(keys[middle:], promised)
        else:
            for key in keys:
                promised[key].set_exception(_another(failed))

    def _break(self, keys: Sequence[Key], promised: _Promised, error: BaseException) -> None:
        """Tell those who still wait that nobody will ask for them."""
        for future in [promised[key] for key in keys if not promised[key].done()]:
            future.set_exception(
                LookupUnavailableError(
                    f"{self._name} was not asked: whoever was to, for several, was stopped by {type(error).__name__}",
                    name=self._name,
                )
            )

    def _end(self) -> None:
        with self._ended:
            self._under_way -= 1
            self._ended.notify_all()


def _may_be_one_of_them(error: Exception) -> bool:
    """Whether the same call with fewer keys may succeed: it was refused, and not because of who asks, or how."""
    if isinstance(error, DjpError):
        return not error.transient and not isinstance(error, LookupForbiddenError | InvalidSettingError)
    return True


def _another(error: Exception) -> Exception:
    """An error of ours again: each thread that raises it adds to its traceback."""
    if not isinstance(error, DjpError):
        return error
    again = copy.copy(error)
    again.__cause__ = error.__cause__
    return again
