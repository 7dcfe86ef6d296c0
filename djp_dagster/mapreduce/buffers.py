"""What a map task keeps until it ends: accumulators or pairs, up to a number of bytes; the rest in sorted runs on disk.

At the end everything is merged into one run for each reducer. A run on disk is written by partition: each partition's
rows lie together, sorted, and where they begin is kept in memory.
"""

import errno
import io
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from djp_dagster.errors import InvalidValueError, PayloadStoreUnavailableError, ShuffleSpaceError
from djp_dagster.mapreduce.combining import CombineFn
from djp_dagster.mapreduce.grouping import combined
from djp_dagster.mapreduce.keys import partitions_of
from djp_dagster.mapreduce.runs import Rows, in_order, joined, merged, read_run, rows_of, write_run

_ENTRY_BYTES = 110
"""Of a dict, for each key, as long as it grows."""
_SAMPLE = 64
_MOST_SPILLS = 64
_PAIRS = 1 << 15
"""Kept as Python objects."""


class Section(NamedTuple):
    """Where the rows of a partition lie in a spilled run."""

    start: int
    length: int


class Buffer(ABC):
    """See the module.

    Args:
        folder: where runs are spilled to.
        partitions: how many reducers there are.
        partition_by: what of a key decides which reducer gets it; all of it unless given.
        max_bytes: what is in memory may take about as much.

    Attributes:
        spilled_bytes: written to disk and read again.
    """

    def __init__(
        self, folder: Path, partitions: int, partition_by: Callable[[Any], Any] | None, max_bytes: int
    ) -> None:
        self._folder, self._partitions, self._partition_by = folder, partitions, partition_by
        self._max_bytes = max_bytes
        self._spills: list[tuple[BinaryIO, dict[int, Section]]] = []
        self.spilled_bytes = 0

    @abstractmethod
    def fold(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Take in pairs of key and value."""

    @abstractmethod
    def _bytes(self) -> int:
        """About how much memory is taken."""

    @abstractmethod
    def _sorted_parts(self) -> Iterator[tuple[int, Rows]]:
        """What is in memory: for each partition that has any its rows, sorted; nothing is in memory then."""

    @abstractmethod
    def _merge(self, runs: Sequence[Iterator[Rows]]) -> Iterator[Rows]:
        """Sorted runs as one."""

    def close(self) -> None:
        """Forget everything."""
        for file, _ in self._spills:
            file.close()
        self._spills.clear()

    def relieve(self) -> None:
        """Write what is in memory to disk if it takes too much of it."""
        if self._bytes() > self._max_bytes:
            self._spill()

    def finish(self) -> Iterator[tuple[int, Iterator[Rows]]]:
        """For each partition that has any its rows, sorted; to be used up in turn."""
        in_memory = dict(self._sorted_parts())
        for partition in range(self._partitions):
            runs = [_section(file, sections[partition]) for file, sections in self._spills if partition in sections]
            if partition in in_memory:
                runs.append(iter((in_memory.pop(partition),)))
            if runs:
                yield partition, self._merge(runs)

    def _spill(self) -> None:
        if len(self._spills) >= _MOST_SPILLS:
            self._merge_spills()
        with self._new_file() as (file, sections):
            for partition, rows in self._sorted_parts():
                sections[partition] = self._write(file, iter((rows,)))
        release_unused()

    def _merge_spills(self) -> None:
        """Make one spilled run of all, so that a task of any size has few files."""
        old = list(self._spills)
        with self._new_file() as (file, sections):
            for partition in range(self._partitions):
                mine = [_section(one, found[partition]) for one, found in old if partition in found]
                if mine:
                    sections[partition] = self._write(file, self._merge(mine))
        for one, _ in old:
            one.close()
        del self._spills[: len(old)]

    @contextmanager
    def _new_file(self) -> Iterator[tuple[BinaryIO, dict[int, Section]]]:
        with roomy(self._folder):
            file: BinaryIO = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            sections: dict[int, Section] = {}
            self._spills.append((file, sections))
            yield file, sections
            file.flush()

    def _write(self, file: BinaryIO, rows: Iterator[Rows]) -> Section:
        start = file.tell()
        write_run(_Unclosed(file), rows)  # type: ignore[arg-type]
        self.spilled_bytes += file.tell() - start
        return Section(start, file.tell() - start)


class CombiningBuffer(Buffer):
    """One accumulator for each key."""

    def __init__(
        self,
        combine: CombineFn[Any, Any, Any],
        folder: Path,
        partitions: int,
        partition_by: Callable[[Any], Any] | None,
        max_bytes: int,
    ) -> None:
        super().__init__(folder, partitions, partition_by, max_bytes)
        self._combine = combine
        self._table: dict[Any, Any] = {}
        self._folded, self._weighed, self._entry_bytes = 0, 0, 0.0

    def fold(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """See `Buffer`."""
        self._combine.fold(self._table, pairs)
        self._folded += len(pairs)

    def _bytes(self) -> int:
        # What an entry takes is looked at again when there were half as many pairs more: accumulators may grow, too.
        if self._folded > 1.5 * self._weighed:
            step = max(1, len(self._table) // _SAMPLE)
            sample = list(islice(self._table.items(), 0, None, step))
            total = sum(size_of(key) + size_of(value) for key, value in sample)
            self._weighed, self._entry_bytes = self._folded, total / max(1, len(sample)) + _ENTRY_BYTES
        return int(len(self._table) * self._entry_bytes)

    def _sorted_parts(self) -> Iterator[tuple[int, Rows]]:
        keys, values = list(self._table), list(self._table.values())
        self._table.clear()
        self._folded = self._weighed = 0
        if not keys:
            return
        if self._partitions == 1:
            yield 0, in_order(rows_of(keys, values))
            return
        found: list[list[int]] = [[] for _ in range(self._partitions)]
        for number, partition in enumerate(partitions_of(keys, self._partitions, self._partition_by)):
            found[partition].append(number)
        for partition, numbers in enumerate(found):
            if numbers:
                yield partition, in_order(rows_of([keys[one] for one in numbers], [values[one] for one in numbers]))

    def _merge(self, runs: Sequence[Iterator[Rows]]) -> Iterator[Rows]:
        return combined(merged(runs), self._combine)


class GroupingBuffer(Buffer):
    """All values of each key.

    Args:
        sort_by: what values of a key are sorted by; they are not unless given.
    """

    def __init__(
        self,
        sort_by: Callable[[Any], Any] | None,
        folder: Path,
        partitions: int,
        partition_by: Callable[[Any], Any] | None,
        max_bytes: int,
    ) -> None:
        super().__init__(folder, partitions, partition_by, max_bytes)
        self._sort_by = sort_by
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._chunks: list[tuple[Rows, Any]] = []
        self._chunk_bytes = self._waiting_bytes = 0

    def fold(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """See `Buffer`. Pairs become columns soon: as Python objects they would take many times the memory."""
        for keys, values in (zip(*pairs, strict=True),) if pairs else ():
            self._keys += keys
            self._values += values
            step = max(1, len(keys) // _SAMPLE)
            sample = [size_of(one) for column in (keys, values) for one in column[::step]]
            self._waiting_bytes += sum(sample) * len(keys) * 2 // len(sample)
        if len(self._keys) >= _PAIRS or self._waiting_bytes > self._max_bytes // 8:
            self._pack()

    def _pack(self) -> None:
        import numpy as np

        keys, self._keys = self._keys, []
        values, self._values = self._values, []
        self._waiting_bytes = 0
        if not keys:
            return
        partitions = np.zeros(len(keys), np.int32)
        if self._partitions > 1:
            partitions[:] = partitions_of(keys, self._partitions, self._partition_by)
        rows = rows_of(keys, values, None if self._sort_by is None else list(map(self._sort_by, values)))
        self._chunks.append((rows, partitions))
        self._chunk_bytes += rows.nbytes + partitions.nbytes

    def _bytes(self) -> int:
        # They are there three times while they are sorted: in chunks, in one piece, and in order.
        return 3 * self._chunk_bytes + self._waiting_bytes

    def _sorted_parts(self) -> Iterator[tuple[int, Rows]]:
        import numpy as np
        import pyarrow as pa

        self._pack()
        chunks, self._chunks, self._chunk_bytes = self._chunks, [], 0
        if not chunks:
            return
        rows = joined([rows for rows, _ in chunks])
        partitions = np.concatenate([numbers for _, numbers in chunks])
        chunks.clear()
        for partition in range(self._partitions):
            mine = np.flatnonzero(partitions == partition)
            if len(mine) == len(rows):
                yield partition, in_order(rows)
            elif len(mine):
                yield partition, in_order(rows.take(pa.array(mine)))

    def _merge(self, runs: Sequence[Iterator[Rows]]) -> Iterator[Rows]:
        return merged(runs)


def release_unused() -> None:
    """Give memory back that Arrow keeps for later: other parts of the process count on it."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def size_of(value: Any, depth: int = 2) -> int:
    """About how much memory a value takes, with what it holds."""
    size = sys.getsizeof(value)
    if depth and isinstance(value, (tuple, list, set, frozenset)) and value:
        some = [size_of(item, depth - 1) for number, item in enumerate(value) if number < _SAMPLE]
        size += sum(some) * len(value) // len(some)
    elif depth and isinstance(value, dict) and value:
        pairs = [
            size_of(key, depth - 1) + size_of(item, depth - 1)
            for number, (key, item) in enumerate(value.items())
            if number < _SAMPLE
        ]
        size += sum(pairs) * len(value) // len(pairs)
    return size


@contextmanager
def roomy(folder: Path | str) -> Iterator[None]:
    """No space left as an error that names the place.

    Raises:
        ShuffleSpaceError: naming the folder.
    """
    try:
        yield
    except PayloadStoreUnavailableError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(folder) from error
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise no_space(folder) from error


def no_space(folder: Path | str) -> ShuffleSpaceError:
    """The error for a full disk."""
    return ShuffleSpaceError(
        f"no space left in {str(folder)!r} for the temporary files of a map-reduce; make room, or name another place "
        "with temp_folder= or work=",
        folder=str(folder),
    )


def wrong_pairs(pairs: Iterable[Any], error: Exception) -> InvalidValueError:
    """The error for pairs that cannot be taken in: which of them is at fault, and why."""
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            return InvalidValueError(
                f"a mapper must yield pairs, (key, value), not {type(pair).__name__} {str(pair)[:80]!r}",
                type=type(pair).__name__,
            )
        try:
            hash(pair[0])
        except TypeError:
            from djp_dagster.mapreduce.keys import invalid_key

            return invalid_key(pair[0])
    return InvalidValueError(f"the combiner cannot take the values of the mapper: {error}", type=None)


class _Unclosed:
    """A file for Arrow, which closes what it has written to."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        """See `BinaryIO`."""
        return self._file.write(data)

    def tell(self) -> int:
        """See `BinaryIO`."""
        return self._file.tell()

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Not yet."""


class _Part:
    """A part of a file as a file; several may read from the same file in turn."""

    closed = False

    def __init__(self, file: BinaryIO, section: Section) -> None:
        self._file, self._at, self._end = file, section.start, section.start + section.length

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `BinaryIO`; from where it stands."""
        self._at += offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """See `BinaryIO`."""
        left = self._end - self._at
        self._file.seek(self._at)
        found = self._file.read(left if size < 0 else min(size, left))
        self._at += len(found)
        return found

    def readable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """It stays open."""


def _section(file: BinaryIO, section: Section) -> Iterator[Rows]:
    return read_run(_Part(file, section))  # type: ignore[arg-type]
