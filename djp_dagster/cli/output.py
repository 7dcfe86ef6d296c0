"""What commands print: JSON for programs; tables, sizes and ages for people."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from djp_dagster.errors import InvalidSettingError
from djp_dagster.streams.records import from_micros
from djp_dagster.units import parse_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_UNWRAPPED = 100_000
_encode = msgspec.json.Encoder().encode

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead, for programs.")


def json_bytes(value: object) -> bytes:
    """The value as JSON; what JSON cannot say becomes text."""
    try:
        return _encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return _encode(repr(value))


def print_json(document: object) -> None:
    """One JSON document on one line of standard output."""
    click.echo(json_bytes(document))


def note(message: str) -> None:
    """A line for people, beside the result."""
    click.echo(message, err=True)


def console(*, stderr: bool = False) -> "Console":
    """A rich console that takes text as it is; into a file or a pipe it breaks no lines."""
    from rich.console import Console

    file = sys.stderr if stderr else sys.stdout
    width = None if file.isatty() or os.environ.get("COLUMNS") else _UNWRAPPED
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def table(*columns: str, right: Sequence[str] = ()) -> "Table":
    """An empty table; the ``right`` columns are numbers, which are never broken."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        number = column in right
        made.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return made


def show(*parts: "RenderableType") -> None:
    """Print tables and lines on standard output, without blanks at the ends of lines."""
    out = console()
    if out.is_terminal:
        for part in parts:
            out.print(part)
        return
    with out.capture() as captured:
        for part in parts:
            out.print(part)
    click.echo("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


def plain(text: object) -> str:
    """The text without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def count(number: int | None) -> str:
    """A whole number, for people."""
    return "-" if number is None else f"{number:,}"


def size(number: int | None, *, estimated: bool = False) -> str:
    """Bytes, for people; ``~`` before what is estimated."""
    if number is None:
        return "-"
    amount, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    figure = f"{number}" if unit == "B" else f"{amount:.1f}" if amount < 99.95 else f"{amount:.0f}"
    return f"{'~' if estimated else ''}{figure} {unit}"


def duration(seconds: float | None) -> str:
    """A time span, for people."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    for limit_s, unit_s, unit in ((5970, 60, "min"), (172_500, 3600, "h")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def moment(micros: int | None) -> str | None:
    """A time in ISO 8601, exactly."""
    return None if micros is None else from_micros(micros).isoformat(timespec="microseconds").replace("+00:00", "Z")


def short_moment(micros: int) -> str:
    """A time in ISO 8601 to the millisecond, rounded down; commands take it back."""
    return from_micros(micros).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def ago(micros: int | None, now_micros: int) -> str:
    """How long ago, for people."""
    return "-" if micros is None else duration((now_micros - micros) / 1e6)


def seconds(text: str) -> float:
    """A time span of the command line, such as 30s or 5min; a usage error if it is none."""
    try:
        return parse_seconds(text, name="the time span")
    except InvalidSettingError as error:
        raise click.BadParameter(str(error)) from error
