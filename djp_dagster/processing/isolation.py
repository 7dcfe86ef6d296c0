"""Events handled one by one, each with effects of its own: what fails takes nothing with it."""

import logging
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from djp_dagster.processing.batch import Batch
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.failures import systemic
from djp_dagster.state.task_state import TaskState
from djp_dagster.streams.records import Record

_log = logging.getLogger(__name__)
_AHEAD = 2
"""So many times the concurrency may be begun before the first of them has ended."""


def handle_each(consumer: Consumer, batch: Batch, resources: Mapping[str, Any], state: TaskState | None) -> None:
    """Call the handler for each record; those that fail terminally go to the dead letters.

    Returns, or raises, only when no call is under way any more.

    Raises:
        Exception: what a handler raised that is not terminal.
        SystemicFailureError: more than ``max_poison`` failed.
    """
    if consumer.concurrency > 1:
        _concurrently(consumer, batch, resources)
    else:
        _one_by_one(consumer, batch, resources, state)


def _one_by_one(consumer: Consumer, batch: Batch, resources: Mapping[str, Any], state: TaskState | None) -> None:
    effects, poison = batch.effects, _Poison(batch)
    given = {**resources, "batch": batch} if consumer.wants_batch else resources
    for record in batch:
        mark, state_mark = effects.mark(), state.mark() if state is not None else 0
        try:
            consumer.handler(record, **given)
        except Exception as error:
            if consumer.retry.judge(error) != "terminal":
                raise
            effects.undo(mark)
            if state is not None:
                state.undo(state_mark)
            poison.add(record, error)


class _Call(NamedTuple):
    record: Record
    batch: Batch
    future: "Future[Any]"


def _concurrently(consumer: Consumer, batch: Batch, resources: Mapping[str, Any]) -> None:
    under_way: deque[_Call] = deque()
    poison = _Poison(batch)
    with ThreadPoolExecutor(consumer.concurrency, thread_name_prefix=f"djp-{batch.group}") as pool:
        try:
            for record in batch:
                scoped = batch.scoped(record)
                given = {**resources, "batch": scoped} if consumer.wants_batch else resources
                under_way.append(_Call(record, scoped, pool.submit(consumer.handler, record, **given)))
                if len(under_way) >= _AHEAD * consumer.concurrency:
                    _settle(consumer, poison, under_way.popleft())
            while under_way:
                _settle(consumer, poison, under_way.popleft())
        except BaseException:
            for call in under_way:
                call.future.cancel()
            raise


def _settle(consumer: Consumer, poison: "_Poison", call: _Call) -> None:
    """Wait for a call, and take its effects in: in the order of the records, whoever is quicker."""
    try:
        call.future.result()
    except Exception as error:
        if consumer.retry.judge(error) != "terminal":
            raise
        poison.add(call.record, error)
    else:
        poison.batch.effects.take_in(call.batch.effects)


class _Poison:
    """The records of a batch on which its handler has raised; not those that it has failed itself."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self._raised = batch, 0

    def add(self, record: Record, error: Exception) -> None:
        batch = self.batch
        if not self._raised:
            # Once per batch: the dead letters have the type and the text of each.
            _log.warning("handler %s failed on record %s", batch.group, record.position, exc_info=error)
        batch.fail(record, error)
        self._raised += 1
        count = self._raised + len(batch.undecodable)
        if count > batch.max_poison:
            found = batch.effects.failed[record.position]
            raise systemic(batch.group, batch.max_poison, batch.id, count, found.error_type, found.error)
