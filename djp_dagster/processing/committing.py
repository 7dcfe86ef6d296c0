"""Steps 5 to 7 of the protocol: store the output, commit once, apply the state changes."""

import logging
from typing import Any

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.claim_check.serializers import store_value
from djp_dagster.errors import StateMismatchError, StreamBusyError
from djp_dagster.processing.failures import OUTAGES, Patience
from djp_dagster.processing.handling import Attempt
from djp_dagster.state.file import Change
from djp_dagster.state.stores import TaskStores
from djp_dagster.streams.model import Commit, Intent, Lease, NewDeadLetter, Poison
from djp_dagster.streams.records import (
    CODEC_CHANGES,
    EncodedBatch,
    TopicPartition,
    encode_changes,
    raw_records,
)
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import changelog_of

_log = logging.getLogger(__name__)


class Committer:
    """Makes the effects of an attempt visible, once.

    Args:
        stream: where they go.
        stores: the local state they are applied to afterwards.
        patience: how outages are waited for.
    """

    def __init__(self, stream: EventStream, stores: TaskStores, patience: Patience) -> None:
        self._stream, self._stores, self._patience = stream, stores, patience
        self._coordinator = stream.coordinator

    def store_output(self, intent: Intent, value: Any) -> PayloadRef | None:
        """Store what the handler returned, under a path of this attempt."""
        if value is None:
            return None
        key = f"attempts/{intent.group}/{intent.batch_id}/{intent.attempt}/output"
        return store_value(self._stream.payloads, key, value)

    def prepare(self, lease: Lease, intent: Intent, attempt: Attempt, output: PayloadRef | None) -> Commit:
        """Everything the batch changes."""
        poison = {found.position: found for found in intent.poison} | attempt.effects.failed
        redrive = intent.kind == "redrive"
        failed = {
            letter.id: found
            for letter in attempt.letters
            if (found := poison.get((letter.topic, letter.partition, letter.offset))) is not None
        }
        return Commit(
            lease=lease.part(intent.tasks),
            intent=intent,
            emits=attempt.emits,
            changelog=self._changelog_of(intent, attempt.changes),
            output=output,
            dead_letters=(
                *(() if redrive else (self._dead_letter(found) for found in poison.values())),
                *attempt.effects.letters,
            ),
            redriven=tuple(letter.id for letter in attempt.letters if letter.id not in failed),
            redrive_failed=tuple((number, found.error_type, found.error) for number, found in failed.items()),
            deadlines=attempt.effects.deadlines,
            requests=intent.requests,
        )

    def _changelog_of(self, intent: Intent, changes: list[Change]) -> tuple[tuple[EncodedBatch, int], ...]:
        if not changes:
            return ()
        (task,) = intent.tasks
        blob = encode_changes(changes)
        encoded = EncodedBatch(changelog_of(intent.group), task, len(changes), blob, CODEC_CHANGES)
        return ((encoded, self._stores[task].offset),)

    def _dead_letter(self, found: Poison) -> NewDeadLetter:
        at = TopicPartition(found.topic, found.partition)
        (stored,) = self._stream.log.read(at, found.offset, end=found.offset + 1, max_bytes=1)
        raw = raw_records(stored)[found.offset - stored.base_offset]
        return NewDeadLetter(*found.position, stored.append_micros, raw, found.error_type, found.error)

    def commit(self, commit: Commit) -> None:
        """Commit, and settle what an outage leaves open.

        Raises:
            FencedError, DeadlineOvertakenError: nothing changed.
        """
        unclear = False
        while True:
            try:
                if not (unclear and self._coordinator.settle(commit)):
                    unclear = True
                    self._coordinator.commit(commit)
            except OUTAGES as error:
                self._patience.wait_out(error)
            else:
                self._patience.came_back()
                return

    def apply(self, commit: Commit, changes: list[Change]) -> None:
        """Bring the local state to what was committed; if it cannot be, it catches up later."""
        for encoded, offset in commit.changelog:
            self._stores.grown(encoded.partition, encoded.count, len(encoded.blob))
            try:
                self._stores[encoded.partition].apply(changes, offset, offset + encoded.count)
            except (StateMismatchError, StreamBusyError) as error:
                # The commit stands; the local store is only a cache, and catches up when it is opened anew.
                _log.warning("local state is left behind: %s", error)
                self._stores.drop([encoded.partition])
