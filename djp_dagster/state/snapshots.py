"""Snapshots: copies of a task's state in the payload store, so that restoring it does not read its whole changelog.

How one comes to be, by the holder of the task's lease, between two batches:

1. **Copy** the local file, compacted, into a temporary one, and look at every value of it.
   *Crash:* a temporary file, removed by the next who takes one.
2. **Store** it in the payload store, under its hash.
   *Crash:* a payload that nothing refers to; collection removes it.
3. **Make it known**, in one transaction that checks the lease's epoch: a holder that was fenced meanwhile changes
nothing.
   *Crash after 3:* the snapshot is known, and the changelog longer than it need be; the next snapshot sees to that.
4. **Compact**: the record batches of the changelog that the oldest of the kept snapshots covers are removed.

So the changelog does not grow with what was ever changed: it is bounded by what changes between ``keep`` snapshots.
"""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from djp_dagster.claim_check.references import mentions_in
from djp_dagster.errors import InvalidSettingError
from djp_dagster.state.file import StateFile
from djp_dagster.streams.model import NewSnapshot
from djp_dagster.units import Size, is_count, parse_bytes

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore

MEDIA_TYPE = "application/vnd.sqlite3"


class SnapshotPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a task's state is copied to the payload store.

    The next one is due as soon as the changelog has grown by ``bytes`` or ``changes`` since the last, and by half of
    what that one weighs: so however large the state, snapshots write at most twice what the changelog does.

    Args:
        bytes: of the changelog since the last snapshot; a number or ``"64MiB"``.
        changes: in the changelog since then.
        keep: how many are kept, at least 2: if the newest is damaged, the one before it serves.

    Raises:
        InvalidSettingError: naming the argument and what is allowed.
    """

    bytes: Size = "64MiB"
    changes: int = 1_000_000
    keep: int = 2

    def __post_init__(self) -> None:
        if parse_bytes(self.bytes, name="bytes") < 1:
            raise InvalidSettingError(
                f"SnapshotPolicy(bytes={self.bytes!r}) must be above 0", setting="bytes", value=self.bytes
            )
        for name, value, least in (("changes", self.changes, 1), ("keep", self.keep, 2)):
            if not is_count(value) or value < least:
                raise InvalidSettingError(
                    f"SnapshotPolicy({name}={value!r}) must be {least} or more", setting=name, value=value
                )

    def is_due(self, changes: int, size: int, last_size: int) -> bool:
        """Whether the next one is: so many changes, of so many bytes, after one of ``last_size`` bytes."""
        reached = changes >= self.changes or size >= parse_bytes(self.bytes)
        return reached and size >= last_size // 2


def take(file: StateFile, task: int, payloads: "PayloadStore") -> NewSnapshot:
    """Steps 1 and 2: store a copy of ``file``, whose task nobody else works on.

    Raises:
        StateMismatchError: the file is damaged.
        PayloadStoreUnavailableError, PayloadStoreRefusedError: nothing is known of it.
    """
    prefix = f"{file.path.name}.snapshot-"
    for left_over in file.path.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=file.path.parent) as folder:
        copy = Path(folder) / "state.db"
        offset = file.offset
        file.copy_to(copy)
        mentions: set[bytes] = set()
        for key, value in file.items():
            mentions.update(mentions_in(key))
            mentions.update(mentions_in(value))
        stored = payloads.put(copy, media_type=MEDIA_TYPE, compress=False)
    return NewSnapshot(task, offset, stored.ref, b"\n".join(sorted(mentions)))
