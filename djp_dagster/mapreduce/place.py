"""The work place of a job: runs under paths of attempts, and documents that commit them, in a payload store."""

import io
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.claim_check.objects import DocumentChanged
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.claim_check.writing import uploading
from djp_dagster.mapreduce.buffers import roomy
from djp_dagster.mapreduce.runs import Rows, write_run

ARROW = "application/vnd.apache.arrow.stream"
_INLINE_BYTES = 64 << 10
_COPY_BYTES = 1 << 20


class Piece(msgspec.Struct, frozen=True):
    """A sorted run of one partition: with the answer if it is small, else in the work place.

    Attributes:
        rows: how many.
        size: in bytes, as stored.
    """

    partition: int
    rows: int
    size: int
    inline: bytes | None = None
    ref: PayloadRef | None = None


class WorkPlace:
    """Where one job keeps what its tasks hand to each other.

    Args:
        store: holds it, under ``attempts/map_reduce/<job id>``.
        job_id: of the job.
        durable: whether documents are written to the store too, so that the job can be gone on with.
        temp_folder: for temporary files of tasks.
    """

    def __init__(self, store: PayloadStore, job_id: str, *, durable: bool, temp_folder: Path) -> None:
        self._store = store.within(f"attempts/map_reduce/{job_id}")
        self.durable, self.temp_folder = durable, temp_folder
        self._documents: dict[str, bytes] = {}

    # Runs

    def write(self, attempt: str, partition: int, rows: Iterator[Rows]) -> Piece:
        """Keep a run that an attempt has made."""
        with roomy(self._store.uri), uploading(self._store, f"{attempt}/{partition:05}.arrow", ARROW) as upload:
            count = write_run(upload.file, rows)
            content = upload.if_small(_INLINE_BYTES)
            if content is not None:
                return Piece(partition, count, len(content), inline=content)
            ref = upload.finish()
        return Piece(partition, count, ref.bytes, ref=ref)

    @contextmanager
    def open(self, piece: Piece) -> Iterator[BinaryIO]:
        """A run, verified; as a local file, because many are read at once."""
        if piece.inline is not None:
            yield io.BytesIO(piece.inline)
            return
        assert piece.ref is not None
        with self._store.open(piece.ref) as file:
            if _is_local(file):
                yield file
                return
            with roomy(self.temp_folder), tempfile.TemporaryFile(dir=self.temp_folder) as local:
                shutil.copyfileobj(file, local, _COPY_BYTES)
                local.seek(0)
                yield local

    # Documents

    def commit(self, task: str, answer: bytes) -> bytes:
        """Make the answer that of the task, unless it has one; the one it has then."""
        if not self.durable:
            return self._documents.setdefault(task, answer)
        try:
            self._store.objects.write_document(f"committed/{task}", answer, expected=None)
        except DocumentChanged:
            there = self.committed(task)
            return answer if there is None else there
        return answer

    def committed(self, task: str) -> bytes | None:
        """The answer of a task; None if it has none yet."""
        if not self.durable:
            return self._documents.get(task)
        found = self._store.objects.read_document(f"committed/{task}")
        return None if found is None else found.body

    def any_committed(self) -> bool:
        """Whether somebody has worked on the job before."""
        return self.durable and next(iter(self._store.objects.list("committed/")), None) is not None

    def holds(self, pieces: Iterable[Piece]) -> bool:
        """Whether all of them are there still."""
        refs = [piece.ref for piece in pieces if piece.ref is not None]
        return all(
            (found := self._store.objects.info(ref.key)) is not None and found.bytes == ref.bytes for ref in refs
        )

    def forget(self, task: str) -> None:
        """Take back what was committed: what it refers to is gone."""
        self._store.objects.delete([f"committed/{task}"])

    def remove(self) -> None:
        """Remove all of the job; what is committed last, so that nobody goes on with half of it."""
        keys = [found.key for found in self._store.objects.list()]
        self._store.objects.delete([key for key in keys if key.startswith("committed/")])
        self._store.objects.delete([key for key in keys if not key.startswith("committed/")])


def attempt_name(task: str, number: int) -> str:
    """The path of an attempt: two of the same number, which a cluster may start, do not meet."""
    return f"{task}/{number}-{uuid.uuid4().hex[:12]}"


def _is_local(file: Any) -> bool:
    try:
        file.fileno()
    except (AttributeError, OSError):
        return False
    return True
