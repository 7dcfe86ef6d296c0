"""`Closing`: what becomes of keys and parts that wait no longer: the handler, the dead letters, the late topic."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from djp_dagster.errors import (
    BufferFullError,
    DjpError,
    EventTooLargeError,
    InvalidEventError,
    InvalidSettingError,
    JoinIncompleteError,
    LatePartError,
    MissingKeyError,
)
from djp_dagster.joining.entries import Entry, Part, Status
from djp_dagster.joining.filling import Filling
from djp_dagster.joining.joined import Joined, emit
from djp_dagster.joining.ledger import Key, Ledger, Mark
from djp_dagster.joining.rules import JoinRules
from djp_dagster.processing.failures import describe, systemic
from djp_dagster.streams.claimed import ClaimedData
from djp_dagster.streams.model import NewDeadLetter
from djp_dagster.streams.records import Origin

if TYPE_CHECKING:
    from djp_dagster.processing.batch import Batch

Judge = Callable[[BaseException], str]


class Closing:
    """Ends keys of one batch, and refuses parts.

    Attributes:
        origin: what the records of the task share; of the record batch that is being handled, if one is.

    Args:
        rules: of the join.
        batch: where effects go.
        ledger: where it is remembered.
        filling: which parts are there.
        call: the handler.
        judge: what an exception of it means.
    """

    def __init__(
        self,
        rules: JoinRules,
        batch: "Batch",
        ledger: Ledger,
        filling: Filling,
        call: Callable[[Joined], Any],
        judge: Judge,
    ) -> None:
        self._rules, self._batch, self._ledger, self._filling = rules, batch, ledger, filling
        self._call, self._judge = call, judge
        self._failed_keys = 0
        self.origin = Origin("", batch.task, 0, ledger.summary.scope, _claimed(batch))

    def finish(self, key: Key, entry: Entry, missing: tuple[str, ...], now: int) -> None:
        """Call the handler, once for ever."""
        effects = self._batch.effects
        mark = effects.mark()
        joined = Joined(self._batch, key, self._filling.named(entry, self.origin), missing)
        try:
            self._call(joined)
        except Exception as error:
            if self._judge(error) != "terminal":
                raise
            if not self._failed_keys:
                self._batch.log.warning("group %s failed on key %r", self._batch.group, key, exc_info=error)
            joined.failure = error
            self._failed_keys += 1
        if joined.failure is not None:
            effects.undo(mark)
            self._require_tolerable(joined.failure)
            self._give_up(key, entry, "failed", joined.failure, now)
            return
        self._ledger.summary.completed += 1
        self._batch.count("completed_keys")
        self._ledger.close(key, "completed", now)

    def _require_tolerable(self, error: BaseException) -> None:
        limit = self._batch.max_poison
        if self._failed_keys > limit:
            raise systemic(self._batch.group, limit, self._batch.id, self._failed_keys, *describe(error))

    def expire(self, key: Key, entry: Entry, now: int) -> None:
        """Its deadline has passed."""
        missing = self._filling.missing(entry, self.origin)
        self._ledger.touch(key)
        if self._filling.has_required(entry, self.origin):
            self.finish(key, entry, missing, now)
            return
        self._ledger.summary.expired += 1
        self._batch.count("expired_keys")
        if self._rules.on_deadline == "partial":
            self.finish(key, entry, missing, now)
            return
        error = JoinIncompleteError(f"key {key!r}: {', '.join(missing)} missing when its deadline passed")
        self._give_up(key, entry, "expired", error, now)

    def _give_up(self, key: Key, entry: Entry, status: Status, error: BaseException, now: int) -> None:
        for part in entry.all_parts():
            self._dead_letter(part, error)
        if status == "failed":
            self._ledger.summary.failed += 1
            self._batch.count("failed_keys")
        self._ledger.close(key, status, now)

    def too_late(self, key: Key, mark: Mark, part: Part) -> None:
        """A part of a key that is done."""
        self._refuse(part, LatePartError(f"key {key!r} was {mark[0]} before it came"), mark[0] != "completed")

    def refuse(self, key: Key, part: Part) -> None:
        """A part that is later than its key is due, though the key waits still."""
        given_up = self._rules.on_deadline == "dead_letter"
        self._refuse(part, LatePartError(f"key {key!r} is due before it"), given_up)

    def _refuse(self, part: Part, error: DjpError, given_up: bool) -> None:
        self._ledger.summary.late += 1
        self._batch.count("late_parts")
        # What was completed needs no more parts; what became dead letters can be redriven only with all of them.
        if self._rules.late == "drop" or (self._rules.late == "with_key" and not given_up):
            return
        if self._rules.late == "topic":
            record = part.record(self.origin)
            try:
                emit(self._batch, record, self._rules.late_topic, record)
            except (MissingKeyError, InvalidEventError, EventTooLargeError) as unfit:
                error = unfit
            else:
                return
        self._dead_letter(part, error)

    def turn_away(self, key: Key, entry: Entry) -> None:
        """There is no room for the parts that have come with this batch."""
        error = BufferFullError(
            f"key {key!r}: the event buffer of {self._batch.group!r} holds {self._ledger.summary.bytes} bytes of "
            f"{self._rules.max_buffer_bytes} in task {self._batch.task}; raise max_buffer_bytes, or expire keys; then "
            "redrive"
        )
        for part in entry.all_parts():
            if part.is_new:
                self._dead_letter(part, error)
                self._batch.count("refused_parts")

    def _dead_letter(self, part: Part, error: BaseException) -> None:
        if part.is_new and self._batch.is_redrive:
            # It is one already, and stays pending, with the new error.
            self._batch.fail(part.record(self.origin), error)
            return
        letter = NewDeadLetter(part.topic, self._batch.task, part.offset, part.stamp, part.raw, *describe(error))
        self._batch.effects.letters.append(letter)


def _claimed(batch: "Batch") -> ClaimedData | None:
    """Where the data of parts is that are not in the records, for a batch that holds none."""
    try:
        return ClaimedData(batch.payloads, f"of group {batch.group!r}")
    except InvalidSettingError:
        return None
