"""`JsonLines` and `CsvFiles`: lines of text with a structure, split as text is."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from djp_dagster.claim_check.foreign import find
from djp_dagster.errors import SourceError
from djp_dagster.mapreduce.sources.base import SPLIT_BYTES, Bad, Block, Form, cut
from djp_dagster.mapreduce.sources.files import expanded, ranges
from djp_dagster.mapreduce.sources.text import Lines, LineSplit, Paths, decoded, nowhere, paths_of, record_limit
from djp_dagster.units import Size

if TYPE_CHECKING:
    import pyarrow as pa

    from djp_dagster.claim_check.s3_settings import S3Settings

_HEADER_BYTES = 1 << 20


class JsonLines:
    """JSON Lines; a record is what a line holds. ``batch=True`` maps Arrow tables, ``batch="pandas"`` DataFrames.

    Blank lines are passed over. A line that is no JSON is a bad record; of a block that is mapped as a table, it is an
    error.

    Args:
        paths: files and globs, also ``s3://bucket/events/*.jsonl.zst``.
        schema: an Arrow schema of the tables; inferred, block by block, unless given.
        compression, split_bytes, max_record_bytes, s3: as for `TextFiles`.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        schema: "pa.Schema | None" = None,
        compression: str = "auto",
        split_bytes: Size = SPLIT_BYTES,
        max_record_bytes: Size = "16MiB",
        s3: "S3Settings | None" = None,
    ) -> None:
        self.paths, self._schema = paths_of(paths), schema
        self._lines = Lines(b"\n", "utf-8", "strict", record_limit(max_record_bytes))
        self._compression, self._split_bytes, self._s3 = compression, split_bytes, s3

    def forms(self) -> tuple[Form, ...]:
        """See `Source`."""
        return "records", "arrow", "pandas"

    def plan(self) -> Sequence["JsonSplit"]:
        """See `Source`."""
        parts = ranges(
            find(self.paths, self._s3),
            split_bytes=self._split_bytes,
            compression=self._compression,
            splittable=True,
            s3=self._s3,
        )
        return [JsonSplit(part, self._lines, self._schema) for part in parts]


class JsonSplit(LineSplit, frozen=True):
    """See `Split`."""

    schema: Any = None

    def identity(self) -> str:
        """See `Split`."""
        return f"{super().identity()} {self.schema}"

    def blocks(self, form: Form) -> Iterator[Block]:
        """See `Split`."""
        decode = msgspec.json.Decoder().decode
        for position, raw, bad in self.chunks():
            if bad is not None:
                yield bad
            elif form == "records":
                blank: list[None] = []
                block = decoded(self.uri, position, raw, self.lines, _json_or_blank(decode, blank), _JSON_ERRORS)
                if blank:
                    block = _without_blank(block)
                yield block
            else:
                yield _table_block(self._table(raw), form, raw, self.uri)

    def _table(self, raw: bytes) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.json as pj

        try:
            return pj.read_json(
                io.BytesIO(raw),
                read_options=pj.ReadOptions(use_threads=False, block_size=max(len(raw), 1 << 16)),
                parse_options=pj.ParseOptions(explicit_schema=self.schema),
            )
        except pa.ArrowException as error:
            raise _no_table(self.uri, error) from error


_CSV_ERRORS: tuple[type[Exception], ...] = (csv.Error, ValueError)
_JSON_ERRORS: tuple[type[Exception], ...] = (msgspec.DecodeError, ValueError)
_BLANK = object()


def _json_or_blank(decode: Any, blank: list[None]) -> Any:
    def parse(line: str) -> Any:
        if line and not line.isspace():
            return decode(line)
        blank.append(None)
        return _BLANK

    return parse


def _without_blank(block: Block) -> Block:
    kept = [number for number, record in enumerate(block.records) if record is not _BLANK]
    blank = len(block.records) - len(kept)
    locate = block.locate
    return Block(
        records=[block.records[number] for number in kept],
        size=block.size,
        count=block.count - blank,
        bad=block.bad,
        locate=lambda number: locate(kept[number]),
    )


class CsvFiles:
    """CSV files with a header; a record is a `dict` of text. ``batch=True`` maps Arrow tables, ``"pandas"`` DataFrames.

    A line with more or fewer fields than the header is a bad record. Files whose fields may have line breaks in quotes
    must be said to, and are not split then.

    Args:
        paths: files and globs, also ``s3://bucket/*.csv.gz``.
        columns: the names, if the files have no header.
        delimiter, quote: of the fields.
        breaks_in_quotes: whether a field in quotes may have line breaks.
        types: of columns, as Arrow knows them, for ``batch``; inferred, block by block, unless given.
        compression, split_bytes, max_record_bytes, s3: as for `TextFiles`.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Sequence[str] | None = None,
        delimiter: str = ",",
        quote: str = '"',
        breaks_in_quotes: bool = False,
        types: "Mapping[str, pa.DataType] | None" = None,
        compression: str = "auto",
        split_bytes: Size = SPLIT_BYTES,
        max_record_bytes: Size = "16MiB",
        s3: "S3Settings | None" = None,
    ) -> None:
        self.paths = paths_of(paths)
        self._dialect = Dialect(
            tuple(columns) if columns is not None else None, delimiter, quote, breaks_in_quotes, dict(types or {})
        )
        self._lines = Lines(b"\n", "utf-8", "strict", record_limit(max_record_bytes))
        self._compression, self._split_bytes, self._s3 = compression, split_bytes, s3

    def forms(self) -> tuple[Form, ...]:
        """See `Source`."""
        return "records", "arrow", "pandas"

    def plan(self) -> Sequence["CsvSplit"]:
        """See `Source`."""
        parts = ranges(
            find(self.paths, self._s3),
            split_bytes=self._split_bytes,
            compression=self._compression,
            splittable=not self._dialect.breaks_in_quotes,
            s3=self._s3,
        )
        return [CsvSplit(part, self._lines, self._dialect) for part in parts]


class Dialect(msgspec.Struct, frozen=True):
    """How fields are written."""

    columns: tuple[str, ...] | None
    delimiter: str
    quote: str
    breaks_in_quotes: bool
    types: dict[str, Any]


class CsvSplit(LineSplit, frozen=True):
    """See `Split`."""

    dialect: Dialect

    def identity(self) -> str:
        """See `Split`."""
        return f"{super().identity()} {self.dialect}"

    def blocks(self, form: Form) -> Iterator[Block]:
        """See `Split`."""
        names, header_end = self._header()
        if self.dialect.breaks_in_quotes:
            yield from self._whole(names, form)
            return
        for position, raw, bad in self.chunks():
            if bad is not None:
                yield bad
                continue
            if position < header_end:
                position, raw = header_end, raw[header_end - position :]  # noqa: PLW2901
            if not raw:
                continue
            if form == "records":
                blank: list[None] = []
                block = decoded(self.uri, position, raw, self.lines, self._fields(names, blank), _CSV_ERRORS)
                yield _without_blank(block) if blank else block
            else:
                yield _table_block(self._table(raw, names), form, raw, self.uri)

    def _header(self) -> tuple[Sequence[str], int]:
        if self.dialect.columns is not None:
            return self.dialect.columns, 0
        with expanded(self.part) as file:
            head = file.read(_HEADER_BYTES)
        line, newline, _ = head.partition(b"\n")
        if not newline and len(head) == _HEADER_BYTES:
            raise SourceError(f"{self.uri} has no header in its first MiB; name its columns", uri=self.uri)
        try:
            names: list[str] = next(self._reader([line.decode("utf-8-sig").rstrip("\r")]), [])
        except (UnicodeError, csv.Error) as error:
            raise SourceError(f"{self.uri} has no header: {error}; name its columns", uri=self.uri) from error
        return names, len(line) + len(newline)

    def _reader(self, lines: Any) -> Any:
        return csv.reader(lines, delimiter=self.dialect.delimiter, quotechar=self.dialect.quote, strict=True)

    def _fields(self, names: Sequence[str], blank: list[None]) -> Any:
        count = len(names)

        def parse(line: str) -> Any:
            if not line:
                blank.append(None)
                return _BLANK
            fields: list[str] = next(self._reader([line]), [])
            if len(fields) != count:
                raise ValueError(f"{len(fields)} fields, and the header has {count}")
            return dict(zip(names, fields, strict=True))

        return parse

    def _whole(self, names: Sequence[str], form: Form) -> Iterator[Block]:
        """The file from its beginning, field by field: where records end cannot be told in another way."""
        with expanded(self.part) as file:
            text = io.TextIOWrapper(io.BufferedReader(_Readable(file)), "utf-8-sig", newline="")
            reader = self._reader(text)
            rows: list[dict[str, str]] = []
            bad: list[Bad] = []
            if self.dialect.columns is None:
                next(reader, None)
            for number, fields in enumerate(self._rows(reader)):
                if len(fields) == len(names):
                    rows.append(dict(zip(names, fields, strict=True)))
                else:
                    reason = f"{len(fields)} fields, and the header has {len(names)}"
                    bad.append(Bad(self.uri, number, reason, cut(repr(fields).encode())))
                if len(rows) + len(bad) >= 1 << 13:
                    yield self._block(rows, bad, form, number + 1)
                    rows, bad = [], []
            if rows or bad:
                yield self._block(rows, bad, form, number + 1)

    def _rows(self, reader: Any) -> Iterator[list[str]]:
        try:
            yield from (fields for fields in reader if fields)
        except (csv.Error, UnicodeError) as error:
            raise SourceError(f"{self.uri}, line {reader.line_num}: {error}", uri=self.uri) from error

    def _block(self, rows: list[dict[str, str]], bad: list[Bad], form: Form, end: int) -> Block:
        size = sum(sum(map(len, row.values())) + len(row) for row in rows)
        count = len(rows) + len(bad)
        if form != "records":
            raise SourceError(
                f"{self.uri}: tables of files with line breaks in quotes are not made; map records", uri=self.uri
            )
        return Block(
            records=rows,
            size=size,
            count=count,
            bad=bad,
            locate=lambda number: (end - count + number, repr(rows[number]).encode()),
        )

    def _table(self, raw: bytes, names: Sequence[str]) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.csv as pc

        try:
            return pc.read_csv(
                io.BytesIO(raw),
                read_options=pc.ReadOptions(
                    use_threads=False, column_names=list(names), block_size=max(len(raw) + 1, 1 << 16)
                ),
                parse_options=pc.ParseOptions(delimiter=self.dialect.delimiter, quote_char=self.dialect.quote),
                convert_options=pc.ConvertOptions(column_types=self.dialect.types or None),
            )
        except pa.ArrowException as error:
            raise _no_table(self.uri, error) from error


class _Readable(io.RawIOBase):
    """A file that has only `read`, for whoever wants more."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """See `io.RawIOBase`."""
        body = self._file.read(len(buffer))
        buffer[: len(body)] = body
        return len(body)


def _table_block(table: "pa.Table", form: Form, raw: bytes, uri: str) -> Block:
    whole: Any = table.to_pandas() if form == "pandas" else table
    return Block(whole=whole, size=len(raw), count=table.num_rows, locate=nowhere)


def _no_table(uri: str, error: Exception) -> SourceError:
    return SourceError(
        f"a block of {uri} cannot become a table: {error}; map records, or give the types of its columns", uri=uri
    )
