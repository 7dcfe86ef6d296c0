"""Dagster resources over the core's stream. Each is a thin, configurable shell: the core does the work."""

import logging
import os
import threading
from pathlib import Path

import dagster as dg
from pydantic import Field

from djp_dagster.claim_check.stores import LocalPayloadStore
from djp_dagster.streams.location import URL_VARIABLE, default_folder, default_url
from djp_dagster.streams.stream import EventStream, open_stream

_log = logging.getLogger(__name__)


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
    payload_folder: str | None = Field(
        default=None, description="Where batch outputs lie; beside the stream's file unless given."
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
        return _opened(self.url or _told_default(), self.payload_folder)

    def state_path(self) -> Path:
        """The folder of local state."""
        if self.state_folder is not None:
            return Path(self.state_folder)
        url = self.url or default_url()
        if url.startswith("sqlite:///"):
            file = Path(url.removeprefix("sqlite:///"))
            return file.with_name(f"{file.stem}-state")
        return default_folder() / "state"


_open_streams: dict[tuple[int, str, str | None], EventStream] = {}
_opening = threading.Lock()


def _opened(url: str, payload_folder: str | None) -> EventStream:
    """The stream of this process: Dagster makes a new resource for every tick and step, and connections cost."""
    key = (os.getpid(), url, payload_folder)
    with _opening:
        if key not in _open_streams:
            payloads = None if payload_folder is None else LocalPayloadStore(payload_folder)
            _open_streams[key] = open_stream(url, payloads=payloads)
        return _open_streams[key]


def _told_default() -> str:
    if os.environ.get(URL_VARIABLE):
        return default_url()
    folder = default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_absolute():
        _log.warning("DAGSTER_HOME names no lasting folder: the stream lies in %s", folder.resolve())
    return default_url()
