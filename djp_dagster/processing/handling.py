"""Steps 3 and 4 of the protocol: read a batch for its handler, run the handler, collect what it wants to happen."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from djp_dagster.errors import StateMismatchError
from djp_dagster.processing.batch import Batch, ByteCount, read_ranges
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.crash_points import reach
from djp_dagster.processing.effects import Effects, EmitScope, Position
from djp_dagster.processing.failures import HandlerError
from djp_dagster.processing.isolation import handle_each
from djp_dagster.processing.views import Views
from djp_dagster.state.file import Change
from djp_dagster.state.stores import TaskStores
from djp_dagster.state.task_state import TaskState
from djp_dagster.streams.model import DeadLetter, Intent, Lease, Range
from djp_dagster.streams.records import EncodedBatch, Origin, Record, Undecodable, decode_one
from djp_dagster.streams.stream import EventStream


class Attempt(msgspec.Struct):
    """One successful run of the handler, ready to commit.

    Attributes:
        value: what the handler returned.
        letters: the dead letters it was given, in a redrive.
        bytes: encoded size of what it read.
    """

    effects: Effects
    emits: tuple[EncodedBatch, ...]
    changes: list[Change]
    value: Any
    letters: Sequence[DeadLetter]
    bytes: int


class Handling:
    """Runs a consumer's handler on batches, or on parts of them.

    Args:
        stream: where the records are.
        consumer: whose handler to run.
        resources: its further parameters.
        stores: the local state of its tasks.
        state_folder: where replicas of tables lie.
    """

    def __init__(
        self,
        stream: EventStream,
        consumer: Consumer,
        resources: Mapping[str, Any],
        stores: TaskStores,
        state_folder: Path | None,
    ) -> None:
        self._stream, self._consumer, self._stores = stream, consumer, stores
        self._resources = consumer.resources_from(resources)
        self._emit_topics = [stream.log.topic(topic.name) for topic in consumer.emits]
        self._input_topics = {topic.name: stream.log.topic(topic.name) for topic in consumer.topics}
        self._payloads = stream.payloads if stream.has_payloads else None
        self._views = Views(stream, consumer, state_folder)
        # Keys of idempotent calls are those of the live version: what it has done need not be done again.
        self._scope = f"{stream.incarnation[:12]}/{consumer.follows or consumer.group}"

    def close(self) -> None:
        """Release the replicas that handlers have read."""
        self._views.close()

    def add_figures(self, effects: Effects) -> None:
        """Put what the consumer's resources have done since the last time among the figures of a batch.

        Whatever was done in attempts that failed, and in the search for poison, is in it: a service was asked.
        """
        add_figures(effects, self._resources)

    def run(self, lease: Lease, intent: Intent, ranges: Sequence[Range], skip: frozenset[Position]) -> Attempt:
        """Run the handler on ``ranges`` without ``skip`` (in a redrive: on the intent's dead letters).

        Raises:
            HandlerError: the handler failed, transiently or terminally; nothing of it is kept.
        """
        consumer = self._consumer
        scope = EmitScope(self._stream.incarnation, consumer.group, intent.batch_id)
        effects = Effects(scope, self._emit_topics, consumer.max_emit_bytes, self._payloads)
        state, redrive = self._state_of(intent), intent.kind == "redrive"
        if intent.command is not None and intent.command.get("kind") == "rebuild":
            ranges = self._history(ranges)
        letters = self._letters_of(intent) if redrive else ()
        log, count, claimed = self._stream.log, ByteCount(), self._stream.claimed
        batch = Batch(
            intent,
            source=lambda: (
                self._read_letters(letters) if redrive else read_ranges(log, ranges, skip, self._scope, count, claimed)
            ),
            size=len(letters) if redrive else sum(part.end - part.start for part in ranges) - len(skip),
            effects=effects,
            topics=self._input_topics,
            fencing_token=max(lease.epochs[task] for task in intent.tasks),
            state=state,
            payloads=self._payloads,
            # A redrive that fails says nothing about what is pending.
            max_poison=len(letters) if redrive else consumer.max_poison,
            blocks=consumer.on_poison == "block" and not redrive,
            views=self._views,
        )
        batch.is_replay = consumer.follows is not None
        self._views.begin_batch()
        reach("4.handling")
        try:
            value = self._call(batch, state)
            emits = effects.encode_emits()
            if consumer.follows is not None:
                emits, value = (), None  # the live version has emitted this, and returned it
            changes = state.changes() if state is not None else []
        except StateMismatchError as error:
            raise self._restored_later(intent, error) from error
        except Exception as error:
            if consumer.retry.judge(error) in ("outage", "fatal"):
                raise
            raise HandlerError(error) from error
        size = sum(len(letter.raw) for letter in letters) + count.total
        return Attempt(effects, emits, changes, value, letters, size)

    def _state_of(self, intent: Intent) -> TaskState | None:
        """The state of the batch's task, caught up with its changelog; None for a consumer without."""
        if not self._consumer.stateful:
            return None
        try:
            return TaskState(self._stores.caught_up(intent.tasks[0]).file)
        except StateMismatchError as error:
            raise self._restored_later(intent, error) from error

    def _restored_later(self, intent: Intent, error: StateMismatchError) -> HandlerError:
        """Nobody's fault, and counted as an attempt: a disk on which it happens again and again is told of."""
        self._stores.restore_later(intent.tasks, str(error))
        return HandlerError(error)

    def _call(self, batch: Batch, state: TaskState | None) -> Any:
        consumer = self._consumer
        if consumer.isolate == "batch":
            return consumer.handle(batch, self._resources)
        handle_each(consumer, batch, self._resources, state)
        return None

    def _history(self, ranges: Sequence[Range]) -> list[Range]:
        """All that was ever handled: from where the log begins to the committed offsets."""
        spans = self._stream.log.spans([part.topic for part in ranges])
        return [Range(part.topic, part.partition, spans[part.at].begin, part.start) for part in ranges]

    def _letters_of(self, intent: Intent) -> list[DeadLetter]:
        letters = self._stream.coordinator.dead_letters_by_id(intent.group, intent.dead_letters)
        return [letter for letter in letters if letter.status == "pending"]

    def _read_letters(self, letters: Sequence[DeadLetter]) -> Iterator[tuple[list[Record], list[Undecodable]]]:
        for letter in letters:
            origin = Origin(letter.topic, letter.partition, letter.append_micros, self._scope, self._stream.claimed)
            record = decode_one(letter.raw, letter.offset, origin)
            yield ([], [record]) if isinstance(record, Undecodable) else ([record], [])


def add_figures(effects: Effects, resources: Mapping[str, Any]) -> None:
    """Put what resources of ours have done since the last time among the figures, under their names."""
    for name, resource in resources.items():
        take = getattr(resource, "take_figures", None)
        if take is not None:
            counts, measures = take()
            for figure, number in counts.items():
                effects.counts[f"{name}_{figure}"] = number
            effects.gauges.update({f"{name}_{figure}": value for figure, value in measures.items()})
