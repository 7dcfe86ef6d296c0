"""`ParquetFiles`: Parquet by row group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from djp_dagster.claim_check.foreign import Found, find
from djp_dagster.errors import SourceError
from djp_dagster.mapreduce.sources.base import SPLIT_BYTES, Block, Form
from djp_dagster.mapreduce.sources.files import Range, window_of
from djp_dagster.mapreduce.sources.text import Paths, paths_of
from djp_dagster.units import Size, parse_bytes

if TYPE_CHECKING:
    import pyarrow.parquet as pq

    from djp_dagster.claim_check.s3_settings import S3Settings

_ROWS = 1 << 14


class ParquetFiles:
    """Parquet files; a record is a row, as a `dict`. ``batch=True`` maps Arrow batches, ``"pandas"`` DataFrames.

    Args:
        paths: files and globs, also ``s3://bucket/table/*.parquet``.
        columns: only these are read; all unless given.
        split_bytes: row groups of about so many bytes, as stored, are mapped by one task.
        s3: as for `TextFiles`.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Sequence[str] | None = None,
        split_bytes: Size = SPLIT_BYTES,
        s3: "S3Settings | None" = None,
    ) -> None:
        self.paths = paths_of(paths)
        self._columns = tuple(columns) if columns is not None else None
        self._split_bytes, self._s3 = parse_bytes(split_bytes, name="split_bytes"), s3

    def forms(self) -> tuple[Form, ...]:
        """See `Source`."""
        return "records", "arrow", "pandas"

    def plan(self) -> Sequence["ParquetSplit"]:
        """See `Source`."""
        return [split for found in find(self.paths, self._s3) for split in self._splits(found)]

    def _splits(self, found: Found) -> Iterator["ParquetSplit"]:
        with _opened(Range(found, 0, found.size, "none", self._s3)) as parquet:
            metadata = parquet.metadata
            first, size = 0, 0
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                stored = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
                if size and size + stored > self._split_bytes:
                    yield ParquetSplit(found, first, number, size, self._columns, self._s3)
                    first, size = number, 0
                size += stored
            if first < metadata.num_row_groups:
                yield ParquetSplit(found, first, metadata.num_row_groups, size, self._columns, self._s3)


class ParquetSplit(msgspec.Struct, frozen=True):
    """See `Split`. The row groups from ``first`` on and before ``end``."""

    found: Found
    first: int
    end: int
    size: int
    columns: tuple[str, ...] | None
    s3: "Any" = None

    @property
    def uri(self) -> str:
        """See `Split`."""
        return self.found.uri

    def identity(self) -> str:
        """See `Split`."""
        return f"{self.uri} {self.found.size} {self.found.version} {self.first} {self.end} {self.columns}"

    def blocks(self, form: Form) -> Iterator[Block]:
        """See `Split`."""
        import pyarrow as pa

        with _opened(Range(self.found, 0, self.found.size, "none", self.s3)) as parquet:
            position = sum(parquet.metadata.row_group(number).num_rows for number in range(self.first))
            try:
                batches = parquet.iter_batches(
                    _ROWS, row_groups=list(range(self.first, self.end)), columns=self.columns, use_threads=False
                )
                for batch in batches:
                    yield self._block(batch, form, position)
                    position += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise _damaged(self.uri, error) from error

    @staticmethod
    def _block(batch: Any, form: Form, position: int) -> Block:
        def locate(number: int) -> tuple[int, bytes]:
            return position + number, repr(batch.slice(number, 1).to_pylist()[0]).encode()

        if form == "records":
            return Block(records=batch.to_pylist(), size=batch.nbytes, count=batch.num_rows, locate=locate)
        whole = batch.to_pandas() if form == "pandas" else batch
        return Block(whole=whole, size=batch.nbytes, count=batch.num_rows, locate=locate)


@contextmanager
def _opened(part: Range) -> "Iterator[pq.ParquetFile]":
    import pyarrow as pa
    import pyarrow.parquet as pq

    with window_of(part) as window:
        try:
            parquet = pq.ParquetFile(window, pre_buffer=False)
        except pa.ArrowException as error:
            raise _damaged(part.found.uri, error) from error
        yield parquet


def _damaged(uri: str, error: Exception) -> SourceError:
    return SourceError(f"{uri} is damaged, or no Parquet: {error}; fetch it again", uri=uri)
