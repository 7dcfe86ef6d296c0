"""Dead letters back through their group's handler, and that handler alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from djp_dagster.errors import UnknownDeadLetterError
from djp_dagster.processing.commands import carry_out
from djp_dagster.processing.consumer import Consumer
from djp_dagster.streams.model import DeadLetter
from djp_dagster.streams.stream import EventStream
from djp_dagster.units import Duration

_PAGE = 1000


def request_redrive(stream: EventStream, group: str, ids: Sequence[int] | None = None) -> list[int]:
    """Ask whoever works for ``group`` to redrive dead letters; the numbers of the requests.

    Args:
        stream: the stream.
        group: the consumer group.
        ids: which of its pending dead letters; all unless given.

    Raises:
        UnknownDeadLetterError: naming those that are not pending dead letters of the group.
    """
    if ids is None:
        letters = _pending(stream, group)
    else:
        letters = [one for one in _by_id(stream, group, ids) if one.status == "pending"]
        missing = sorted(set(ids) - {letter.id for letter in letters})
        if missing:
            raise UnknownDeadLetterError(
                f"group {group!r} has no pending dead letters {missing}; see stream.dead_letters({group!r})",
                group=group,
                ids=missing,
            )
    by_task: dict[int, list[DeadLetter]] = {}
    for letter in letters:
        by_task.setdefault(letter.partition, []).append(letter)
    return [
        stream.coordinator.request(group, "redrive", _body(task, members[start : start + _PAGE]))
        for task, members in sorted(by_task.items())
        for start in range(0, len(members), _PAGE)
    ]


def _body(task: int, letters: Sequence[DeadLetter]) -> dict[str, object]:
    # How often each was redriven before tells a holder that takes over which ones this request has tried.
    return {
        "task": task,
        "ids": [letter.id for letter in letters],
        "redrives": [letter.redrives for letter in letters],
    }


def _pending(stream: EventStream, group: str) -> list[DeadLetter]:
    letters: list[DeadLetter] = []
    while True:
        after = letters[-1].id if letters else 0
        page = stream.coordinator.dead_letters(group, status="pending", after=after, limit=_PAGE)
        letters += page
        if len(page) < _PAGE:
            return letters


def _by_id(stream: EventStream, group: str, ids: Sequence[int]) -> list[DeadLetter]:
    return [
        letter
        for start in range(0, len(ids), _PAGE)
        for letter in stream.coordinator.dead_letters_by_id(group, ids[start : start + _PAGE])
    ]


def redrive(
    stream: EventStream,
    consumer: Consumer,
    ids: Sequence[int] | None = None,
    *,
    resources: Mapping[str, Any] | None = None,
    state_folder: Path | None = None,
    wait: Duration = "1min",
) -> list[DeadLetter]:
    """Redrive dead letters, here if the group is free, else by whoever holds it.

    Effects and the new status become visible in one commit each. What fails again stays pending, with its new error.

    Returns:
        The dead letters as they are afterwards.

    Raises:
        UnknownDeadLetterError: naming those that are not pending.
        LeaseBusyError: a holder did not get to it within ``wait``.
    """
    numbers = [letter.id for letter in _pending(stream, consumer.group)] if ids is None else sorted(set(ids))
    requests = request_redrive(stream, consumer.group, numbers)
    carry_out(stream, consumer, requests, resources=resources, state_folder=state_folder, wait=wait)
    return _by_id(stream, consumer.group, numbers)
