"""Every error of this package, in one tree.

.. code-block:: text

    DjpError
    ├── TransientError                  trying again later may succeed; nothing was lost
    │   ├── StreamUnavailableError      the database is away, or the connection broke
    │   ├── StreamBusyError             a lock was not granted in time
    │   ├── StreamFullError             no space left where the stream lies
    │   ├── AmbiguousPublishError       the connection broke during COMMIT of an unnamed publish
    │   ├── LeaseBusyError              somebody else holds a task of the group
    │   ├── FencedError                 the lease was lost; somebody else continues
    │   ├── RetriesExhaustedError       a transient failure outlived its retry budget
    │   ├── PayloadStoreUnavailableError    the payload store is away, or too busy
    │   ├── WorkerDiedError             a process died at its task, as often as it was tried
    │   ├── LookupUnavailableError      a service did not answer, as often as it was asked
    │   ├── NotCaughtUpError            a version that is to be promoted is behind the live one
    │   ├── StaleReadError              a table has not come as far as it was asked for
    │   ├── StateMismatchError          local state that does not continue its changelog: it is restored
    │   ├── ShuffleSpaceError           no space left for the temporary files of a map-reduce
    │   └── DeadlineOvertakenError      an input holds a record older than a fired deadline: cut longer
    └── TerminalError                   trying again cannot help; the cause must change
        ├── InvalidSettingError         a wrong argument or declaration
        ├── InvalidValueError           a value that cannot be stored, in state or as a deadline
        ├── InvalidEventError           not a CloudEvents 1.0 event
        ├── MissingKeyError             an event without the key of its topic
        ├── EventTooLargeError          an event above its topic's limit
        ├── CommitTooLargeError         a batch emitted more than one commit may carry
        ├── UndecodableRecordError      stored bytes that are no event
        ├── TableSchemaError            values of one field that no column can hold
        ├── UnknownTopicError, UnknownGroupError, UnknownDeadLetterError
        ├── TopicMismatchError          declared otherwise than it was created
        ├── GroupMismatchError          likewise, of a consumer group
        ├── ProducerFencedError         a newer producer of the same name has opened
        ├── OffsetOutOfRangeError       a position below retention, or past the end
        ├── StreamNotWritableError      no permission, or a read-only place
        ├── StreamFailedError           the database refused for a reason unknown to this package
        ├── StreamCorruptError          the file is damaged or truncated
        ├── StreamFormatError           written by another format version, or no stream at all
        ├── StreamReplacedError         another stream lies where this one was
        ├── PoisonBlockedError          a poison record in a group that must not skip
        ├── RedriveFailedError          a dead letter failed again; it stays pending
        ├── SystemicFailureError        more poison than ``max_poison``
        ├── ReplayExpiredError          a window that retention has begun to remove
        ├── StateLostError              neither a snapshot nor the beginning of the changelog is left
        ├── CoPartitionError            inputs of a join, or a table, that are not partitioned by its key
        ├── EventDagError               consumers that do not make a chain
        ├── LookupRefusedError          a service says that a request is wrong, or answers nonsense
        ├── LookupForbiddenError        a service does not accept who asks
        ├── BufferFullError             an event that an event buffer has no room for
        ├── JoinIncompleteError         parts of a key whose deadline has passed
        ├── LatePartError               a part that came after its key was completed, or given up
        ├── PayloadStoreRefusedError    no permission, no such bucket, or not what a payload store needs
        ├── CollectionRefusedError      garbage collection cannot prove what is garbage
        ├── SourceError                 input of a map-reduce that is missing, damaged, or changed while it was read
        ├── BadRecordsError             more records that cannot be mapped than the job allows
        ├── MapReduceFailedError        a mapper, combiner or reducer raised, twice
        └── PayloadError
            ├── InvalidClaimError       not a claim
            ├── PayloadForbiddenError   a claim that leaves the configured store, or wants what was not allowed
            ├── PayloadMissingError     a reference to bytes that are not there
            ├── PayloadExpiredError     likewise, because their time was up
            ├── PayloadCorruptError     bytes that do not match their reference
            └── PayloadTooLargeError    more bytes than may be stored, or be read into memory

Every error carries ``facts``, the names and values it speaks of, and survives pickling, because exceptions cross
process borders in Dagster. A handler may raise `TransientError` or `TerminalError` itself to decide its own fate.
"""

from typing import Any


class DjpError(Exception):
    """Root of the tree; catch it to catch everything this package raises on purpose.

    Args:
        message: what happened, to which thing, with which value, and what to do about it.
        **facts: the names and values the message speaks of, for programs.

    Example:
        >>> error = UnknownTopicError("topic 'clicks' does not exist", topic="clicks")
        >>> error.facts["topic"], error.transient
        ('clicks', False)
    """

    transient: bool = False

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.facts)


def _rebuild(kind: type[DjpError], args: tuple[str], facts: dict[str, Any]) -> DjpError:
    return kind(*args, **facts)


class TransientError(DjpError):
    """Trying again later may succeed. Moves no offset and dead-letters nothing."""

    transient = True


class TerminalError(DjpError):
    """Trying again cannot help: the input, the code or the configuration must change first."""


class StreamUnavailableError(TransientError):
    """The stream's database cannot be reached, or the connection to it broke."""


class StreamBusyError(TransientError):
    """The database did not grant a lock in time."""


class StreamFullError(TransientError):
    """No space is left where the stream lies; nothing of the refused write is visible."""


class AmbiguousPublishError(TransientError):
    """An unnamed publish lost its connection during COMMIT: its events are there once, or not at all."""


class LeaseBusyError(TransientError):
    """A task of the group is leased by somebody else, named in ``facts["holder"]``."""


class FencedError(TransientError):
    """The lease was lost to somebody else; nothing of this attempt was committed, and nothing must be reported."""


class RetriesExhaustedError(TransientError):
    """A transient failure outlived the consumer's retry budget; the offsets stay and the next run starts afresh."""


class DeadlineOvertakenError(TransientError):
    """An input holds an unread record stamped before a fired deadline; the batch must be cut longer."""


class PayloadStoreUnavailableError(TransientError):
    """The payload store cannot be reached, is too busy, or broke off, after all retries."""


class WorkerDiedError(TransientError):
    """The process that worked on a task of a map-reduce died, or stood still, as often as the task was tried."""


class LookupUnavailableError(TransientError):
    """A service did not answer, or said that it cannot for now; ``facts["retry_after_s"]`` is what it asked for."""


class NotCaughtUpError(TransientError):
    """A version of a group that is to take the place of the live one has not done all that that has."""


class StaleReadError(TransientError):
    """A table has not come as far as a reader asked for, in the time it would wait."""


class ShuffleSpaceError(TransientError):
    """No space is left where a map-reduce keeps its temporary files; ``facts["folder"]`` names the place."""


class InvalidSettingError(TerminalError):
    """An argument, setting or declaration is wrong."""


class InvalidValueError(TerminalError):
    """A handler gave a value that cannot be stored; the record that led to it is at fault."""


class InvalidEventError(TerminalError):
    """Not a CloudEvents 1.0 event; ``facts["attribute"]`` names what is wrong."""


class MissingKeyError(TerminalError):
    """An event lacks the key its topic is partitioned by, or the key is neither a string nor an integer."""


class EventTooLargeError(TerminalError):
    """An encoded event is above its topic's ``max_event_bytes``."""


class CommitTooLargeError(TerminalError):
    """A batch emitted (or changed in state) more bytes than one commit may carry."""


class UndecodableRecordError(TerminalError):
    """The stored bytes of a record are no event; the record goes to the dead letters, its neighbours do not."""


class TableSchemaError(TerminalError):
    """The values of a field are of types that no Arrow column can hold together."""


class UnknownTopicError(TerminalError):
    """No topic of that name exists in the stream."""


class UnknownGroupError(TerminalError):
    """No consumer group of that name exists in the stream."""


class UnknownDeadLetterError(TerminalError):
    """No dead letter of that number awaits what was asked for it."""


class TopicMismatchError(TerminalError):
    """A topic is declared otherwise than it was created."""


class GroupMismatchError(TerminalError):
    """A consumer group is declared otherwise than it was created."""


class ProducerFencedError(TerminalError):
    """A newer producer of the same name has opened; this one must not publish any more."""


class OffsetOutOfRangeError(TerminalError):
    """A position below retention, or past the end; ``facts`` name the lost or impossible range."""


class StreamNotWritableError(TerminalError):
    """The stream's place cannot be written: no permission, a read-only file system, or no such folder."""


class StreamFailedError(TerminalError):
    """The database refused something for a reason this package does not know; no record is to blame."""


class StreamCorruptError(TerminalError):
    """The stream's file is damaged or truncated."""


class StreamFormatError(TerminalError):
    """The file is no stream, or was written in a format version this release cannot use."""


class StreamReplacedError(TerminalError):
    """Another stream lies where this one was when it was opened."""


class PoisonBlockedError(TerminalError):
    """A poison record stands at the head of a group whose order must be kept at all cost."""


class RedriveFailedError(TerminalError):
    """A dead letter failed again when it was redriven; it stays pending, with the new error."""


class SystemicFailureError(TerminalError):
    """More records of a batch fail than ``max_poison``: the code or a dependency is at fault, not the data."""


class StateMismatchError(TransientError):
    """A task's local state does not continue its changelog; it must be discarded and restored."""


class ReplayExpiredError(TerminalError):
    """What a replay is to read is no longer whole: retention has begun to remove it."""


class StateLostError(TerminalError):
    """No usable snapshot and no complete changelog is left to restore a task's state from."""


class CoPartitionError(TerminalError):
    """Topics that must be partitioned alike are not; ``facts["topics"]`` names them."""


class EventDagError(TerminalError):
    """Consumers do not make a chain: a cycle, an unknown topic, two owners, or something nothing leads to."""


class LookupRefusedError(TerminalError):
    """A service says that a request is wrong, or answers something else than agreed."""


class LookupForbiddenError(TerminalError):
    """A service does not accept who asks: no record is at fault."""


class BufferFullError(TerminalError):
    """An event buffer has no room for an event, which becomes a dead letter."""


class JoinIncompleteError(TerminalError):
    """The deadline of a key has passed, and parts are missing; those that were there become dead letters."""


class LatePartError(TerminalError):
    """A part came after its key was completed, or given up."""


class PayloadStoreRefusedError(TerminalError):
    """The store refuses: no permission, no such bucket, a wrong setting, or a guarantee it does not give."""


class CollectionRefusedError(TerminalError):
    """Garbage collection cannot prove what is garbage; nothing was deleted."""


class SourceError(TerminalError):
    """Input of a map-reduce is missing, damaged, or changed since the job looked; ``facts["uri"]`` names it."""


class BadRecordsError(TerminalError):
    """More records cannot be mapped than the job allows; ``facts`` name the first of them and why."""


class MapReduceFailedError(TerminalError):
    """A task of a map-reduce raised, and raised again when it was repeated; its cause is the exception."""


class PayloadError(TerminalError):
    """A payload cannot be had as its reference promises."""


class InvalidClaimError(PayloadError):
    """Not a claim; ``facts["part"]`` names what is wrong."""


class PayloadForbiddenError(PayloadError):
    """A claim names something outside the configured store, or asks for what was not allowed, such as a pickle."""


class PayloadMissingError(PayloadError):
    """The referenced payload is not in the store."""


class PayloadExpiredError(PayloadError):
    """The claim's time is up."""


class PayloadCorruptError(PayloadError):
    """The stored bytes differ in size or hash from their reference."""


class PayloadTooLargeError(PayloadError):
    """A payload has more bytes than may be stored, or than may be read into memory at once."""
