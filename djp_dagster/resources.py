"""Dagster resources over the core's stream. Each is a thin, configurable shell: the core does the work."""

import os
from pathlib import Path
from tempfile import gettempdir

import dagster as dg
from pydantic import Field, PrivateAttr

from djp_dagster.claim_check.stores import LocalPayloadStore
from djp_dagster.streams.stream import EventStream, open_stream


def default_folder() -> Path:
    """Where the stream lies unless told: ``djp/`` under DAGSTER_HOME; ``./.djp`` without a lasting one."""
    home = os.environ.get("DAGSTER_HOME")
    if home and not Path(home).resolve().is_relative_to(Path(gettempdir()).resolve() / "dagster"):
        return Path(home) / "djp"
    return Path(".djp")


class SqlEventStream(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The event stream, in a SQLite file or in PostgreSQL.

    Opened when first used in a process, and kept open until the process ends.

    Example:
        >>> SqlEventStream(url="sqlite:////var/lib/shop/stream.db").url
        'sqlite:////var/lib/shop/stream.db'
    """

    url: str | None = Field(
        default=None,
        description="sqlite:///path or postgresql+psycopg://user@host/database; a file under DAGSTER_HOME.",
    )
    payload_folder: str | None = Field(
        default=None, description="Where batch outputs lie; beside the stream's file unless given."
    )
    state_folder: str | None = Field(
        default=None,
        description="Where stateful consumers keep their local cache; beside the stream's file unless given.",
    )

    _stream: EventStream | None = PrivateAttr(default=None)

    def open(self) -> EventStream:
        """The stream, opened once per process.

        Raises:
            StreamNotWritableError, StreamFormatError, StreamUnavailableError: naming the place.
        """
        if self._stream is None:
            url = self.url
            if url is None:
                folder = default_folder()
                folder.mkdir(parents=True, exist_ok=True)
                url = f"sqlite:///{folder / 'stream.db'}"
            payloads = None if self.payload_folder is None else LocalPayloadStore(self.payload_folder)
            self._stream = open_stream(url, payloads=payloads)
        return self._stream

    def state_path(self) -> Path:
        """The folder of local state."""
        return Path(self.state_folder) if self.state_folder is not None else default_folder() / "state"
