"""`SqlEventStream`: the event stream as a Dagster resource."""

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import dagster as dg
from pydantic import Field

from djp_dagster.claim_check.location import open_payload_store
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.resources.payload_stores import PayloadStoreResource
from djp_dagster.streams.location import default_folder, default_url, prepared_default_url
from djp_dagster.streams.stream import EventStream, open_stream

_FILE = "sqlite:///"


class SqlEventStream(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The event stream, in a SQLite file or in PostgreSQL.

    Opened when first used in a process, and kept open until the process ends.

    Example:
        >>> SqlEventStream(url="sqlite:////var/lib/shop/stream.db").url
        'sqlite:////var/lib/shop/stream.db'
    """

    url: str | None = Field(
        default=None,
        description="sqlite:///path or postgresql+psycopg://user@host/database; else $DJP_STREAM_URL, else a file "
        "under DAGSTER_HOME.",
    )
    payloads: PayloadStoreResource | None = Field(
        default=None,
        description="Where outputs of batches and heavy data of events lie; else in the bucket $DJP_S3_BUCKET, else "
        "beside the stream's file, or under DAGSTER_HOME.",
    )
    state_folder: str | None = Field(
        default=None,
        description="Where stateful consumers keep their local cache; beside the stream's file, or under DAGSTER_HOME, "
        "unless given.",
    )

    def open(self) -> EventStream:
        """The stream, opened once per process.

        Raises:
            StreamNotWritableError, StreamFormatError, StreamUnavailableError: naming the place.
        """
        return _opened(self.url or prepared_default_url(), self.payloads)

    def opener(self) -> Callable[[], EventStream]:
        """What opens the same stream in another process; picklable."""
        store = self.payloads.open() if self.payloads is not None else None
        return _opener(self.url or prepared_default_url(), store)

    def state_path(self) -> Path:
        """The folder of local state."""
        if self.state_folder is not None:
            return Path(self.state_folder)
        url = self.url or default_url()
        if url.startswith(_FILE):
            file = Path(url.removeprefix(_FILE))
            return file.with_name(f"{file.stem}-state")
        return default_folder() / "state"


class _Opened(NamedTuple):
    stream: EventStream
    file: tuple[int, int] | None


_open_streams: dict[tuple[int, str, PayloadStore | None], _Opened] = {}
_opening = threading.Lock()


def _opened(url: str, payloads: PayloadStoreResource | None) -> EventStream:
    """The stream of this process: Dagster makes a new resource for every tick and step, and connections cost."""
    store = payloads.open() if payloads is not None else None
    key = (os.getpid(), url, store)
    with _opening:
        known = _open_streams.get(key)
        if known is not None and known.file != _file_of(url):
            # Removed or replaced: a connection to the old file would see nothing new for ever.
            del _open_streams[key]
            known.stream.close()
            known = None
        if known is None:
            known = _open_streams[key] = _Opened(_opener(url, store)(), _file_of(url))
        return known.stream


def _opener(url: str, store: PayloadStore | None) -> Callable[[], EventStream]:
    return partial(open_stream, url, payloads=store, default_payloads=open_payload_store(default_folder() / "payloads"))


def _file_of(url: str) -> tuple[int, int] | None:
    """What tells the stream's file from another one in its place; None if it is no file."""
    if not url.startswith(_FILE):
        return None
    try:
        found = Path(url.removeprefix(_FILE)).stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
