"""``djp publish``."""

import hashlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access
from djp_dagster.cli.reading import BadInputError, Item, Source, event_from_cloudevent, event_from_line
from djp_dagster.errors import (
    AmbiguousPublishError,
    DjpError,
    EventTooLargeError,
    InvalidEventError,
    InvalidSettingError,
    MissingKeyError,
)
from djp_dagster.events import Event
from djp_dagster.streams.topics import INTERNAL_PREFIX, Topic

if TYPE_CHECKING:
    from djp_dagster.streams.model import TopicInfo
    from djp_dagster.streams.publishing import Producer
    from djp_dagster.streams.stream import EventStream

_BATCH_BYTES = 8 << 20
_FIRST_BYTES = 1 << 16
_BLAMED = (MissingKeyError, InvalidEventError, EventTooLargeError)


@click.command("publish")
@click.argument("topic")
@click.argument("file", type=click.File("rb"), default="-")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["jsonl", "cloudevents"]),
    default="jsonl",
    show_default=True,
    help="jsonl: each line is the data of one event. cloudevents: each line is a CloudEvents JSON object, or the input "
    "is one JSON array of them; what 'djp tail --json' printed is taken too.",
)
@click.option("--producer", metavar="NAME", help="Continue after what an earlier try has published; see above.")
@click.option("--batch", type=click.IntRange(1, 100_000), default=5000, show_default=True, help="Events per commit.")
@click.option("--skip-lines", type=click.IntRange(0), default=0, metavar="N", help="Leave out the first N lines.")
@click.option("--create", is_flag=True, help="Make the topic (and a SQLite stream) if it is not there.")
@click.option("--partitions", type=int, help="With --create: how many partitions; 1 unless told.")
@click.option("--key", help="With --create: the field of data that decides the partition, e.g. user_id or user.id.")
@output.json_option
@pass_access
def command(
    access: Access,
    topic: str,
    file: BinaryIO,
    kind: str,
    producer: str | None,
    batch: int,
    skip_lines: int,
    create: bool,
    partitions: int | None,
    key: str | None,
    as_json: bool,
) -> None:
    """Publish events from FILE, or from standard input, to TOPIC.

    The input is read as it comes and appended in batches, each of them durable, all or none. A line that is no event
    ends it: everything before that line has been published, nothing after it, and the message says how to go on.

    A second try appends everything again, unless both give the same --producer NAME. Then the stream remembers, with
    each batch, how many lines it has seen, and a second try goes on after them: each line is appended once, whatever
    happened to the first process. What counts as the same input: the same NAME, TOPIC, and first line. Lines are
    counted, not compared, so the input may have grown at its end, but must not have changed before. The ids of jsonl
    events are then made of NAME and line number.
    """
    if not create and (partitions is not None or key is not None):
        raise click.UsageError("--partitions and --key say how to make a topic; add --create")
    if topic.startswith(INTERNAL_PREFIX):
        raise InvalidSettingError(
            f"topic {topic!r} is the library's own: what others append to it breaks it", setting="topic", value=topic
        )
    stream = access.open(create=create)
    info = (
        stream.create_topic(Topic(topic, partitions=1 if partitions is None else partitions, key=key))
        if create
        else stream.log.topic(topic)
    )
    if file.isatty():
        output.note("reading from the terminal; end with Ctrl-D")
    source = Source(
        file, max_item_bytes=8 * info.max_event_bytes + (1 << 16), arrays=kind == "cloudevents", skip=skip_lines
    )
    run = _Publishing(stream, info, source, kind=kind, producer=producer, batch=batch, skip=skip_lines)
    started = time.monotonic()
    try:
        with _progress(file) as progress:
            run.all(progress)
    except (DjpError, BadInputError) as error:
        raise click.ClickException(run.told(error, str(getattr(file, "name", "-")))) from error
    except KeyboardInterrupt:
        output.note(f"{run.so_far()}; stopped. {run.how_to_continue()}")
        raise
    _summary(run, time.monotonic() - started, as_json)


def _summary(run: "_Publishing", seconds: float, as_json: bool) -> None:
    rate = run.published / max(seconds, 1e-6)
    if as_json:
        output.print_json(
            {
                "topic": run.info.name,
                "events": run.published,
                "seconds": round(seconds, 6),
                "events_per_second": round(rate, 1),
                "up_to_line": run.last,
                "already_published_lines": run.seen_before,
            }
        )
        return
    if run.seen_before:
        output.note(
            f"producer {run.producer_name!r} had published the first {run.seen_before:,} {run.source.unit}s before"
        )
    click.echo(f"published {run.published:,} events to {run.info.name} in {seconds:.1f} s ({rate:,.0f} events/s)")


class _Publishing:
    """One input on its way into a topic, and how far it got."""

    def __init__(
        self,
        stream: "EventStream",
        info: "TopicInfo",
        source: Source,
        *,
        kind: str,
        producer: str | None,
        batch: int,
        skip: int,
    ) -> None:
        self._stream, self.info, self.source = stream, info, source
        self._kind, self._batch, self._skip = kind, batch, skip
        self.producer_name = producer
        self._producer: Producer | None = None
        self._events: list[Event] = []
        self._numbers: list[int] = []
        self._bytes = 0
        self._unsure: tuple[int, int] | None = None
        self.published = 0
        self.last = 0
        self.seen_before = 0

    def all(self, progress: "_Progress") -> None:
        """Publish the whole input.

        Raises:
            BadInputError, DjpError: what was before the fault has been published.
        """
        number = 0
        try:
            for item in self.source:
                if item is None:
                    self._flush()
                else:
                    number = item.number
                    if self.producer_name is not None and self._producer is None:
                        self._open_producer(item)
                    self._take(item)
                progress.show(self.source.bytes_read, self.published)
        except BadInputError:
            self._flush()
            raise
        self._flush()
        progress.show(self.source.bytes_read, self.published)
        if number < self.seen_before:
            raise InvalidSettingError(
                f"producer {self.producer_name!r} has published {self.seen_before:,} {self.source.unit}s of this input,"
                f" which now ends at {number:,}: it is another one, or was cut; give another --producer name to "
                "publish it",
                setting="producer",
                value=self.producer_name,
            )

    def _open_producer(self, first: Item) -> None:
        # Another topic or another input must never be taken for what has been published already.
        digest = hashlib.sha256(self.info.name.encode() + b"\0" + first.text[:_FIRST_BYTES].strip()).hexdigest()[:12]
        self._producer = self._stream.producer(f"{self.producer_name}.{digest}")
        self.seen_before = self._producer.last_sequence
        self.last = self.seen_before

    def _take(self, item: Item) -> None:
        if item.number <= max(self._skip, self.seen_before):
            return
        try:
            event = self._event(item)
        except InvalidEventError as error:
            raise BadInputError(item.number, str(error)) from error
        self._events.append(event)
        self._numbers.append(item.number)
        self._bytes += len(item.text)
        if len(self._events) >= self._batch or self._bytes >= _BATCH_BYTES:
            self._flush()

    def _event(self, item: Item) -> Event:
        if self._kind == "cloudevents":
            return event_from_cloudevent(item.text)
        named = None if self._producer is None else f"{self._producer.name}:{item.number}"
        return event_from_line(self.info.name, item.text, named)

    def _flush(self) -> None:
        events, numbers = self._events, self._numbers
        if not events:
            return
        self._events, self._numbers, self._bytes = [], [], 0
        try:
            self._append(events, numbers)
        except _BLAMED as error:
            # Nothing of the batch was appended; what stands before the event at fault still can be.
            good = self._first_at_fault(events)
            self._append(events[:good], numbers[:good])
            raise BadInputError(numbers[good], str(error)) from error

    def _first_at_fault(self, events: Sequence[Event]) -> int:
        from djp_dagster.streams.publishing import route

        payloads = self._stream.payloads if self._stream.has_payloads else None
        for index, event in enumerate(events):
            try:
                list(route(self.info, [event], payloads))
            except _BLAMED:
                return index
        raise AssertionError("a batch was refused, and none of its events is")  # pragma: no cover

    def _append(self, events: Sequence[Event], numbers: Sequence[int]) -> None:
        if not events:
            return
        self._unsure = (numbers[0], numbers[-1])
        with _uninterrupted():
            try:
                if self._producer is not None:
                    self._producer.publish(self.info.name, events, sequence=numbers[-1])
                else:
                    self._stream.publish(self.info.name, events)
            except DjpError as error:
                away = self._producer is not None and error.transient
                if not away and not isinstance(error, AmbiguousPublishError):
                    self._unsure = None
                raise
            self._unsure = None
            self.published += len(events)
            self.last = numbers[-1]

    def so_far(self) -> str:
        """What is in the stream, exactly."""
        unit = self.source.unit
        text = f"published {self.published:,} events" + (f" up to {unit} {self.last}" if self.last else "")
        if self._unsure is not None:
            text += f"; {unit}s {self._unsure[0]} to {self._unsure[1]} are in the stream all or none"
        return text

    def how_to_continue(self) -> str:
        """What to type next."""
        if self.producer_name is not None:
            return "The same command continues there."
        if self._unsure is not None:
            return "'djp tail' shows if they are; --producer would know by itself."
        return f"Continue with --skip-lines {self.last}." if self.last else ""

    def told(self, error: DjpError | BadInputError, name: str) -> str:
        """What went wrong, where, and what is in the stream."""
        if not isinstance(error, BadInputError):
            return f"{self.so_far()}; {error}. {self.how_to_continue()}".rstrip()
        where = f"{'standard input' if name in ('-', '<stdin>') else name} {self.source.unit} {error.number}"
        again = self.producer_name is not None or not self.last
        mended = "the same command" if again else f"--skip-lines {self.last}"
        return (
            f"{self.so_far()}; {where}: {error}. Mend it and continue with {mended}, or leave it out with --skip-lines "
            f"{error.number}"
        )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait until what is under way is known to be done; the second one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


class _Progress:
    """A bar on a terminal, else nothing."""

    def __init__(self, bar: Any = None, task: Any = None, *, by_bytes: bool = False) -> None:
        self._bar, self._task, self._by_bytes = bar, task, by_bytes
        self._shown = -1

    def show(self, bytes_read: int, published: int) -> None:
        """Show how far it is; cheap when nothing was published since."""
        if self._bar is None or published == self._shown:
            return
        self._shown = published
        done = {"completed": bytes_read} if self._by_bytes else {}
        self._bar.update(self._task, description=f"{published:,} events", **done)


@contextmanager
def _progress(file: BinaryIO) -> Iterator[_Progress]:
    if not sys.stderr.isatty():
        yield _Progress()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    total = _size_of(file)
    known = [DownloadColumn(), TimeRemainingColumn()] if total is not None else [TimeElapsedColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *known]
    with Progress(*columns, console=output.console(stderr=True), transient=True) as bar:
        yield _Progress(bar, bar.add_task("0 events", total=total), by_bytes=total is not None)


def _size_of(file: BinaryIO) -> int | None:
    try:
        status = os.fstat(file.fileno())
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
