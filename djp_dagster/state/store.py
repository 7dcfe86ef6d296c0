"""`TaskStore`: a task's state in a local file, which is a cache; the truth is the task's changelog.

How the file comes to be what the changelog says, before every batch and after every hand-over:

1. **Open** the file. It says which changelog it continues, and up to which offset.
   *Damaged, of another stream, of a changelog that a seek has replaced, or ahead of its end:* it is discarded.
2. **Restore**, if nothing is there, or what is there is behind what the changelog still holds: the newest snapshot
   is downloaded beside the file, verified against its hash, opened, and renamed into place. One that is damaged or
   missing is passed over with a warning for the one before it, and in the end for the changelog's beginning.
   *Crash before the rename:* a temporary file, overwritten by the next who restores. *After:* a file at the offset of
   the snapshot.
3. **Catch up**: the changelog's tail is applied, one stored record batch per local transaction, which compares and
   sets the offset.
   *Crash:* the file is behind, and the next catches up from there.

No handler is called in any of it. If neither a snapshot nor the changelog's beginning is left, `StateLostError`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from djp_dagster.errors import PayloadError, StateLostError, StateMismatchError, StreamCorruptError
from djp_dagster.state.file import Change, StateFile, remove
from djp_dagster.streams.contracts import EventLog
from djp_dagster.streams.model import Snapshot
from djp_dagster.streams.records import TopicPartition, decode_changes

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore

_log = logging.getLogger(__name__)
_READ_BYTES = 4 << 20
Snapshots = Callable[[], Sequence[Snapshot]]


def _none() -> Sequence[Snapshot]:
    return ()


class TaskStore:
    """The local store of one task of one group.

    Args:
        path: the file; made with its folder when missing.
        log, changelog: where the truth is.
        snapshots: those of the task, newest first.
        payloads: where they lie.
    """

    def __init__(
        self,
        path: Path,
        log: EventLog,
        changelog: TopicPartition,
        *,
        snapshots: Snapshots = _none,
        payloads: "PayloadStore | None" = None,
    ) -> None:
        self._path, self._log, self._changelog = path, log, changelog
        self._snapshots, self._payloads = snapshots, payloads
        self.lineage = f"{log.incarnation}/{log.topic(changelog.topic).identity}"
        try:
            self._file = self._open(path)
        except StateMismatchError as error:
            self._discard(str(error))

    def _open(self, path: Path) -> StateFile:
        return StateFile(path, self.lineage, f"{self._changelog.topic!r} partition {self._changelog.partition}")

    def _discard(self, why: str) -> None:
        _log.warning("local state %s is discarded and restored: %s", self._path, why)
        remove(self._path)
        self._file = self._open(self._path)

    def restore_later(self, why: str) -> None:
        """Discard what is there; the next `catch_up` restores it."""
        self._file.close()
        self._discard(why)

    @property
    def file(self) -> StateFile:
        """The file as it is now; restoring replaces it."""
        return self._file

    @property
    def offset(self) -> int:
        """The changelog offset up to which changes are applied."""
        return self._file.offset

    def catch_up(self, until: int | None = None) -> int:
        """Apply every committed change not applied yet, up to ``until`` unless that is passed already; where it is now.

        Raises:
            StateLostError: neither a usable snapshot nor the changelog's beginning is left.
        """
        span = self._log.spans([self._changelog.topic])[self._changelog]
        end = span.end if until is None else min(until, span.end)
        try:
            offset = self._file.offset
            if offset > span.end:
                raise self._file.mismatch(f"it is at {offset}, the changelog ends at {span.end}")
        except StateMismatchError as error:
            self.restore_later(str(error))
            offset = 0
        if offset == 0 or offset < span.begin:
            offset = self._restore(offset, span.begin)
        while offset < end:
            for batch in self._log.read(self._changelog, offset, end=end, max_bytes=_READ_BYTES):
                reached = min(batch.end_offset, end)
                skipped, taken = offset - batch.base_offset, reached - batch.base_offset
                self._file.apply(_changes_in(batch.blob)[skipped:taken], offset, reached)
                offset = reached
        return offset

    def _restore(self, offset: int, begin: int) -> int:
        """From the newest usable snapshot; the offset then."""
        beside = self._path.with_name(f"{self._path.name}.restoring")
        for snapshot in self._snapshots() if self._payloads is not None else ():
            if snapshot.offset < max(offset, begin):
                break  # the changelog does not reach back to it, and neither to those before it
            if self._fetch(snapshot, beside):
                self._file.close()
                remove(self._path)
                beside.replace(self._path)
                self._file = self._open(self._path)
                return snapshot.offset
        if offset < begin:
            raise StateLostError(
                f"the state of {self._changelog.topic!r} partition {self._changelog.partition} cannot be restored: its "
                f"changelog begins at offset {begin}, and no snapshot from there on is usable; make it anew from the "
                "events with stream.seek(group, 'earliest', reset_state=True)",
                topic=self._changelog.topic,
                partition=self._changelog.partition,
                begin=begin,
            )
        return offset

    def _fetch(self, snapshot: Snapshot, beside: Path) -> bool:
        assert self._payloads is not None
        remove(beside)
        try:
            self._payloads.download(snapshot.payload, beside)
            file = self._open(beside)
            found = file.offset
            file.close()
            if found != snapshot.offset:
                raise file.mismatch(f"it is at {found}, not {snapshot.offset}")
        except (PayloadError, StateMismatchError) as error:
            _log.warning("snapshot %d of %s is passed over: %s", snapshot.number, self._changelog.topic, error)
            remove(beside)
            return False
        # What opening it has left beside it belongs to the name it had.
        with contextlib.suppress(FileNotFoundError):
            Path(f"{beside}-shm").unlink()
        return True

    def apply(self, changes: Iterable[Change], expected: int, reached: int) -> None:
        """See `StateFile.apply`."""
        self._file.apply(changes, expected, reached)

    def get(self, key: bytes) -> bytes | None:
        """See `StateFile.get`."""
        return self._file.get(key)

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """See `StateFile.get_many`."""
        return self._file.get_many(keys)

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _changes_in(blob: bytes) -> list[Change]:
    try:
        return decode_changes(blob)
    except msgspec.DecodeError as error:
        raise StreamCorruptError(f"a changelog record batch is damaged: {error}; restore the stream") from error
