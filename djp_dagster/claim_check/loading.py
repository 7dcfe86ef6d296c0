"""Handing out a stored value in the form an input wants it.

What fits what: a Parquet payload becomes a table of any library; textual payloads become text; JSON becomes values, and
what they can be converted to; and any payload can be had as bytes, as a stream, as a file, or as its claim. Nothing a
payload or pointer says is imported, and a pickle is read only where nothing else is expected, and only if allowed.
"""

import io
import mimetypes
import pickle
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from djp_dagster.claim_check.claims import Claim
from djp_dagster.claim_check.serializers.json_values import CANNOT, decode_json
from djp_dagster.claim_check.serializers.kinds import JSON, PARQUET, PICKLE, Form, FormName, Kind, name_of
from djp_dagster.claim_check.serializers.tables import iterate_batches, read_arrow, read_pandas
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.claim_check.values import Inline
from djp_dagster.claim_check.writing import may_compress
from djp_dagster.errors import InvalidSettingError, PayloadCorruptError, PayloadForbiddenError

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

_COPY_BYTES = 1 << 20
_NULL = b"null"
_TABLES: tuple[FormName, ...] = ("pandas", "arrow", "batches", "polars", "lazy")
_AS_STORED: dict[Kind, FormName] = {
    "pandas": "pandas",
    "arrow": "arrow",
    "polars": "polars",
    "bytes": "bytes",
    "text": "text",
    "json": "json",
    "file": "path",
    "stream": "stream",
    "claim": "claim",
    "pickle": "json",
}
_SUFFIXES = {PARQUET: ".parquet", "application/x-ndjson": ".jsonl"}


class LoadedFiles:
    """Files and streams that have been handed out; they live until this is closed, or the process ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._removal: weakref.finalize[..., Any] | None = None
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self._count = 0

    def new_path(self, suffix: str) -> Path:
        """A path for one more file."""
        with self._lock:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="djp-inputs-"))
                self._removal = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self._count += 1
            return self._folder / f"payload-{self._count}{suffix}"

    def watch(self, stream: BinaryIO) -> BinaryIO:
        """The stream, which will be closed if its user forgets it."""
        self._streams.add(stream)
        return stream

    def close(self) -> None:
        """Remove the files, close the streams."""
        with self._lock:
            for stream in list(self._streams):
                stream.close()
            if self._removal is not None:
                self._removal()
            self._folder, self._removal = None, None


class PayloadStream(io.BufferedReader, BinaryIO):
    """A payload to be read in order, verified by the time its end is read; what an input annotated `BinaryIO` gets.

    It is opened when it is first read: of hundreds of partitions, none holds a connection or memory until then.
    """

    def __init__(self, held: "Held") -> None:
        super().__init__(_OpenedLater(held), _COPY_BYTES)


class _OpenedLater(io.RawIOBase):
    def __init__(self, held: "Held") -> None:
        self._held = held
        self._opened: Any = None

    def _file(self) -> Any:
        if self._opened is None:
            self._opened = self._held.open()
        return self._opened

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """Up to 8 MiB, and in folders."""
        return bool(self._file().seekable())

    def readinto(self, buffer: Any, /) -> int:
        """The next bytes; 0 at the end."""
        return int(self._file().readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go there, if it can be sought in."""
        return int(self._file().seek(offset, whence))

    def tell(self) -> int:
        """Where it stands."""
        return 0 if self._opened is None else int(self._opened.tell())

    def close(self) -> None:
        """Release what was opened."""
        if not self.closed and self._opened is not None:
            self._opened.close()
        super().close()


class Held(msgspec.Struct, frozen=True):
    """A value that is kept: what it was, and its payload."""

    store: PayloadStore
    kind: Kind
    payload: Claim | Inline

    @property
    def media_type(self) -> str:
        """Of the payload, without parameters."""
        return self.payload.media_type.partition(";")[0].strip().lower()

    def open(self) -> BinaryIO:
        """See `PayloadStore.open`."""
        if isinstance(self.payload, Inline):
            return io.BytesIO(self.payload.content)
        return self.store.open(self.payload)

    def read(self) -> bytes:
        """See `PayloadStore.read`."""
        return self.payload.content if isinstance(self.payload, Inline) else self.store.read(self.payload)

    @contextmanager
    def fetch(self) -> Iterator[BinaryIO]:
        """See `PayloadStore.fetch`."""
        if isinstance(self.payload, Inline):
            yield io.BytesIO(self.payload.content)
        else:
            with self.store.fetch(self.payload) as file:
                yield file

    def download(self, path: Path) -> Path:
        """See `PayloadStore.download`."""
        if isinstance(self.payload, Inline):
            path.write_bytes(self.payload.content)
        else:
            self.store.download(self.payload, path)
        return path

    def claim(self) -> Claim:
        """The claim; of what was inline, a new one, which nothing refers to yet."""
        if isinstance(self.payload, Inline):
            return self.store.put(self.payload.content, media_type=self.payload.media_type).claim
        self.store.resolve(self.payload)  # one that leads elsewhere is not handed on
        return self.payload


def load(held: Held, form: Form, files: LoadedFiles, *, allow_pickle: bool = False) -> Any:
    """The value, in the form that is wanted.

    Raises:
        InvalidSettingError: what was stored cannot be had in that form.
        PayloadForbiddenError: it is a pickle, and that is not wanted.
        PayloadError, PayloadStoreUnavailableError: as `PayloadStore.open`.
    """
    name = _AS_STORED[held.kind] if form.name == "as_stored" else form.name
    wanted = Any if form.name == "as_stored" else form.annotation
    if form.nullable and form.name != "as_stored" and _is_none(held):
        return None
    if name == "bytes":
        return held.read()
    if name == "stream":
        return files.watch(PayloadStream(held))
    if name == "path":
        suffix = _SUFFIXES.get(held.media_type) or mimetypes.guess_extension(held.media_type) or ""
        return held.download(files.new_path(suffix))
    if name == "claim":
        return held.claim()
    if held.media_type == PICKLE:
        return _load_pickle(held, form, allowed=allow_pickle and held.kind == "pickle" and name == "json")
    if name in _TABLES:
        return _load_table(held, name, form, files)
    return _load_text(held, form) if name == "text" else _load_json(held, form, wanted)


def _is_none(held: Held) -> bool:
    payload = held.payload
    size = len(payload.content) if isinstance(payload, Inline) else payload.size
    return held.kind == "json" and size == len(_NULL) and held.read() == _NULL


def _load_pickle(held: Held, form: Form, *, allowed: bool) -> Any:
    if not allowed:
        raise PayloadForbiddenError(
            f"it is a pickle, and {_wanted(form)} is wanted; reading one can run any code. Only an IO manager with "
            "allow_pickle=True reads pickles, and only where no table, text or file is expected",
            wanted=name_of(form.annotation),
        )
    with held.fetch() as file:
        return pickle.load(file)  # noqa: S301 - asked for


def _load_table(held: Held, name: FormName, form: Form, files: LoadedFiles) -> Any:
    if held.media_type != PARQUET:
        raise _does_not_fit(held, form)
    if name == "batches":
        return _load_batches(held)
    if name == "lazy":
        import polars as pl

        return pl.scan_parquet(held.download(files.new_path(".parquet")))
    if name == "polars":
        return _load_polars(held, files)
    with held.fetch() as file:
        return read_pandas(file) if name == "pandas" else read_arrow(file)


def _load_batches(held: Held) -> "pa.RecordBatchReader":
    import pyarrow as pa

    stack = ExitStack()
    schema, batches = iterate_batches(stack.enter_context(held.fetch()))

    def rows() -> "Iterator[pa.RecordBatch]":
        with stack:
            yield from batches

    return pa.RecordBatchReader.from_batches(schema, rows())


def _load_polars(held: Held, files: LoadedFiles) -> "pl.DataFrame":
    import polars as pl

    # By path: polars copies what it is given as an object into memory. What it has mapped outlives the name.
    path = held.download(files.new_path(".parquet"))
    try:
        return pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise _unreadable(held, str(error)) from error
    finally:
        path.unlink()


def _load_text(held: Held, form: Form) -> str:
    if held.kind == "json" or not may_compress(held.media_type):
        raise _does_not_fit(held, form)
    try:
        return held.read().decode()
    except UnicodeDecodeError as error:
        raise _unreadable(held, f"{error}; annotate bytes") from error


def _load_json(held: Held, form: Form, wanted: Any) -> Any:
    if held.media_type != JSON:
        raise _does_not_fit(held, form)
    content = held.read()
    try:
        return decode_json(content, wanted)
    except CANNOT as error:
        if wanted is Any:
            raise _unreadable(held, str(error)) from error
        raise _does_not_fit(held, form, str(error)) from error


def _wanted(form: Form) -> str:
    return "the value" if form.name == "as_stored" else name_of(form.annotation)


def _does_not_fit(held: Held, form: Form, why: str = "") -> InvalidSettingError:
    fitting = {PARQUET: "pd.DataFrame, pa.Table, pa.RecordBatchReader, pl.DataFrame, pl.LazyFrame, ", JSON: "dict, "}
    also = fitting.get(held.media_type, "str, " if may_compress(held.media_type) else "")
    return InvalidSettingError(
        f"{held.kind} of type {held.payload.media_type!r} was stored, and {_wanted(form)} is wanted"
        f"{f' ({why})' if why else ''}; annotate the input {also}bytes, BinaryIO, Path or djp.Claim",
        setting="annotation",
        value=name_of(form.annotation),
    )


def _unreadable(held: Held, why: str) -> PayloadCorruptError:
    return PayloadCorruptError(
        f"its media type is {held.payload.media_type!r}, and its content is not: {why}", media_type=held.media_type
    )
