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
   sets the offset. *Damage found by it:* the file is discarded, and restored.
   *Crash:* the file is behind, and the next catches up from there.

A file is opened, closed, discarded and restored under a lock beside it, which ends with its process: SQLite finds the
log of a database by its name, so the one must not come and go without the other. Who has a file open that was replaced
goes on with the old one until its next step 3.

No handler is called in any of it. If neither a snapshot nor the changelog's beginning is left, `StateLostError`.
"""

import contextlib
import fcntl
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from djp_dagster.errors import (
    OffsetOutOfRangeError,
    PayloadError,
    StateLostError,
    StateMismatchError,
    StreamBusyError,
    StreamCorruptError,
)
from djp_dagster.state.file import Change, StateFile, is_whole, remove, seal
from djp_dagster.streams.contracts import EventLog
from djp_dagster.streams.model import Snapshot
from djp_dagster.streams.records import TopicPartition, decode_changes

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore

_log = logging.getLogger(__name__)
_READ_BYTES = 4 << 20
_TRIES = 20
_LOCK_S = 60.0
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
        self._is_emptied = False
        with self._alone():
            self._file = self._open_or_anew()

    @property
    def lineage(self) -> str:
        """The identity of the changelog; a seek replaces it by another of the same name."""
        return f"{self._log.incarnation}/{self._log.topic(self._changelog.topic).identity}"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within the block no other process opens, discards or restores the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        give_up = time.monotonic() + _LOCK_S
        with Path(f"{self._path}.lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= give_up:
                        raise StreamBusyError(
                            f"local state {str(self._path)!r} is being restored by another process; try again",
                            path=str(self._path),
                        ) from error
                time.sleep(0.02)
            yield

    def _open(self, path: Path) -> StateFile:
        return StateFile(path, self.lineage, f"{self._changelog.topic!r} partition {self._changelog.partition}")

    def _open_or_anew(self) -> StateFile:
        if not is_whole(self._path):
            self._remove("its bytes are not those it was closed with")
        try:
            return self._open(self._path)
        except StateMismatchError as error:
            self._remove(str(error))
            return self._open(self._path)

    def _remove(self, why: str) -> None:
        _log.warning("local state %s is discarded and restored: %s", self._path, why)
        remove(self._path)

    def restore_later(self, why: str) -> None:
        """Discard what is there, unless it has been replaced; the next `catch_up` restores it."""
        with self._alone():
            in_place = self._file.is_in_place()
            self._file.close()
            if in_place:
                self._remove(why)
            self._is_emptied = True
            self._file = self._open_or_anew()

    @property
    def file(self) -> StateFile:
        """The file as it is now; restoring replaces it."""
        if self._is_emptied:
            self.catch_up()
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
        left = _TRIES
        while True:
            left -= 1
            try:
                reached = self._catch_up(until)
            except StateMismatchError as error:
                if not left:
                    raise
                if not error.facts["moved"]:
                    self.restore_later(str(error))
            except OffsetOutOfRangeError:
                # A snapshot has removed what was about to be read.
                if not left:
                    raise
            else:
                self._is_emptied = False
                return reached

    def _catch_up(self, until: int | None) -> int:
        if not self._file.is_in_place():
            with self._alone():
                self._adopt()
        if self._file.lineage != self.lineage:
            raise self._file.mismatch("its changelog was replaced")
        span = self._log.spans([self._changelog.topic]).get(self._changelog)
        if span is None:
            raise StreamBusyError(f"topic {self._changelog.topic!r} is being replaced; try again")
        end = span.end if until is None else min(until, span.end)
        offset = self._file.offset
        if offset > span.end:
            raise self._file.mismatch(f"it is at {offset}, the changelog ends at {span.end}")
        if offset < span.begin or offset == 0 < span.end:
            offset = self._restore(offset, span.begin)
        while offset < end:
            for batch in self._log.read(self._changelog, offset, end=end, max_bytes=_READ_BYTES):
                reached = min(batch.end_offset, end)
                skipped, taken = offset - batch.base_offset, reached - batch.base_offset
                self._file.apply(_changes_in(batch.blob)[skipped:taken], offset, reached)
                offset = reached
        return offset

    def _adopt(self) -> None:
        """Go on with the file that another process has put in the place of this one."""
        self._file.close()
        self._file = self._open_or_anew()

    def _restore(self, offset: int, begin: int) -> int:
        """From the newest usable snapshot, unless another process has done so; the offset then."""
        with self._alone():
            if not self._file.is_in_place():
                self._adopt()
            offset = self._file.offset
            for snapshot in self._snapshots() if self._payloads is not None else ():
                if snapshot.offset <= offset or snapshot.offset < begin:
                    break  # the changelog does not reach back to it, and neither to those before it
                if self._fetch(snapshot):
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

    def _fetch(self, snapshot: Snapshot) -> bool:
        """Put the snapshot in the place of the file; whether it could be used."""
        assert self._payloads is not None
        beside = self._path.with_name(f"{self._path.name}.restoring")
        remove(beside)
        try:
            with self._payloads.open(snapshot.payload) as source, beside.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            with contextlib.closing(self._open(beside)) as file:
                if file.offset != snapshot.offset:
                    raise file.mismatch(f"it is at {file.offset}, not {snapshot.offset}")
        except (PayloadError, StateMismatchError) as error:
            _log.warning("snapshot %d of %s is passed over: %s", snapshot.number, self._changelog.topic, error)
            remove(beside)
            return False
        except OSError as error:
            raise StreamBusyError(f"local state {str(beside)!r}: {error}; try again", path=str(beside)) from error
        self._file.close()
        remove(self._path)
        beside.replace(self._path)
        # What opening it has left beside it belongs to the name it had.
        remove(beside)
        self._file = self._open(self._path)
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
        """Release the file, sealed if nobody else has it open."""
        try:
            if self._file.is_in_place():
                with self._alone():
                    self._file.close()
                    seal(self._path)
        except (StreamBusyError, OSError) as error:
            _log.info("local state %s is left without a checksum: %s", self._path, error)
        finally:
            self._file.close()


def _changes_in(blob: bytes) -> list[Change]:
    try:
        return decode_changes(blob)
    except msgspec.DecodeError as error:
        raise StreamCorruptError(f"a changelog record batch is damaged: {error}; restore the stream") from error
