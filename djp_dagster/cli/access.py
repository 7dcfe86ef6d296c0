"""How a command comes to its stream: opened late, closed at the end, never made by merely looking."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from djp_dagster.streams.location import URL_VARIABLE, default_url, prepared_default_url

if TYPE_CHECKING:
    from djp_dagster.streams.stream import EventStream


class Access:
    """The stream a command line names, and by what."""

    def __init__(self, context: click.Context, target: str | None) -> None:
        self._context = context
        if target is not None and not target.strip():
            raise click.UsageError("--stream is empty; name a file or a URL, or leave it out")
        if target:
            self.target, self.named_by = target, "--stream"
        else:
            self.target = default_url()
            self.named_by = f"${URL_VARIABLE}" if os.environ.get(URL_VARIABLE) else "the default place"

    @property
    def path(self) -> Path | None:
        """The stream's file, if it is one."""
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        if "://" not in self.target:
            return Path(self.target)
        try:
            url = make_url(self.target)
        except ArgumentError as error:
            # The text is not shown: it may hold a password.
            raise click.ClickException(
                f"the stream named by {self.named_by} is no URL; write sqlite:///path, a path, or "
                "postgresql+psycopg://user@host/database"
            ) from error
        return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None

    def open(self, *, create: bool = False) -> "EventStream":
        """The stream, closed when the command ends; made, with its folder in the default place, only if ``create``."""
        from djp_dagster.streams.stream import open_stream

        path = self.path
        if path is None and self.target.startswith("sqlite"):
            raise click.ClickException(
                f"{self.target!r} is a stream in memory, gone when the command ends; name a file"
            )
        if path is not None and not create and not _holds_something(path):
            raise click.ClickException(
                f"there is no stream at {str(path.absolute())!r}, which {self.named_by} names; name another with "
                f"--stream or ${URL_VARIABLE}, or make it: the first run of a consumer does, and "
                "djp publish TOPIC FILE --create --partitions N --key FIELD"
            )
        if path is not None and create and self.named_by == "the default place":
            prepared_default_url()
        stream = open_stream(self.target)
        self._context.call_on_close(stream.close)
        return stream


def _holds_something(path: Path) -> bool:
    # An empty file would become a stream by being opened.
    return path.exists() and not (path.is_file() and path.stat().st_size == 0)


pass_access = click.make_pass_decorator(Access)
