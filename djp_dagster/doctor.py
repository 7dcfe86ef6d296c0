"""What may be wrong with a stream and its groups, and what to do about it. Looks only; changes nothing.

Everything here is read without a lease and in several transactions, so a finding may be a moment old.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from djp_dagster.errors import DjpError
from djp_dagster.streams.model import GroupInfo, Intent, TaskInfo
from djp_dagster.streams.stream import EventStream

OLD_BACKLOG_S = 300.0
"""A backlog older than this that nobody works on is worth a word."""
LONG_BATCH_S = 600.0
"""A batch that was cut longer ago than this is worth a word."""
OLD_REQUEST_S = 120.0
"""A request open for longer than this is worth a word."""
TAKEOVER_S = 30.0
"""By then somebody has taken over from a holder that vanished."""
MANY_FAILURES = 3
"""A batch that failed this often does not get through by itself."""
LITTLE_SPACE_BYTES = 1 << 30

Level = Literal["ok", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at.

    Attributes:
        level: ``problem``, something does not work or records were lost; ``warning``, somebody should look; ``ok``.
        check: what was looked for, a stable name for programs.
        subject: the thing.
        what: how it is.
        remedy: what to do, if anything.
    """

    level: Level
    check: str
    subject: str
    what: str
    remedy: str = ""


def examine(stream: EventStream) -> Iterator[Finding]:
    """Findings about the stream and all its groups; what cannot be looked at is a problem itself."""
    try:
        yield from examine_stream(stream)
        groups = stream.groups()
        if not groups:
            yield Finding("ok", "groups", "groups", "there are none yet; a consumer's first run makes its group")
        for info in groups:
            found = list(examine_group(stream, info))
            yield from found or [Finding("ok", "group", f"group {info.name}", "nothing is wrong")]
    except DjpError as error:
        yield Finding("problem", "stream-reachable", stream.label, str(error), "the message says it")


def examine_stream(stream: EventStream) -> Iterator[Finding]:
    """Findings about the stream itself."""
    try:
        _require_writable(stream)
    except DjpError as error:
        yield Finding("problem", "stream-writable", stream.label, str(error), "the message says it")
    else:
        topics, groups = len(stream.topics()), len(stream.groups())
        yield Finding(
            "ok",
            "stream-writable",
            stream.label,
            f"reachable and writable; {topics} topics, {groups} groups; incarnation {stream.incarnation[:12]}",
        )
    path = file_of(stream)
    if path is not None:
        yield from _examine_place(path)


def file_of(stream: EventStream) -> Path | None:
    """The stream's file, if it is one."""
    database = getattr(stream.log, "database", None)
    return None if database is None else database.path


def _examine_place(path: Path) -> Iterator[Finding]:
    place = path.absolute()
    free = shutil.disk_usage(place.parent).free
    what = f"the file has {place.stat().st_size / 1e6:,.1f} MB, its disk {free / 1e9:,.1f} GB free"
    if free < LITTLE_SPACE_BYTES:
        yield Finding(
            "warning", "stream-place", str(place), what, "free some space, or set a retention on large topics"
        )
    else:
        yield Finding("ok", "stream-place", str(place), what)
    kind = _file_system_of(place)
    if kind.startswith(("nfs", "cifs", "smb", "9p", "fuse.sshfs")):
        yield Finding(
            "problem",
            "stream-place",
            str(place),
            f"it lies on a network file system ({kind}), where SQLite cannot lock reliably",
            "move it to a local disk, or use PostgreSQL",
        )


def _file_system_of(place: Path) -> str:
    """The kind of file system, where Linux tells; else nothing."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    fields = [line.split(" ") for line in mounts.read_text().splitlines()]
    within = [(point, kind) for _, point, kind, *_ in fields if place.is_relative_to(point)]
    return max(within, key=lambda pair: len(pair[0]), default=("", ""))[1]


def examine_group(stream: EventStream, info: GroupInfo) -> Iterator[Finding]:
    """Findings about one group; none if nothing is wrong."""
    subject = f"group {info.name}"
    tasks = stream.coordinator.tasks(info.name)
    backlog = stream.pending(info.name)
    intents = stream.coordinator.intents(info.name)
    now = backlog.now_micros
    held = [task for task in tasks if is_held(task, now)]
    yield from _lost_records(stream, info, subject)
    if backlog.events and backlog.age_s > OLD_BACKLOG_S and not held:
        yield Finding(
            "warning",
            "nobody-works",
            subject,
            f"{backlog.events:,} events are pending, the oldest for {_span(backlog.age_s)}, and nobody holds a task",
            "start its worker, turn its sensor or schedule on, or materialize its asset; ignore it if a batch is to "
            "grow that old",
        )
    for intent in intents:
        yield from _examine_intent(subject, intent, tasks, now)
    # A run is a paused member, too, but one that is at work holds the tasks.
    paused = [member.owner for member in stream.coordinator.members(info.name) if member.live and member.paused]
    if paused and backlog.events and not held:
        yield Finding(
            "problem",
            "paused",
            subject,
            f"{backlog.events:,} events are pending, and {', '.join(paused)} waits after a failure",
            "the run's log says why; it tries again by itself within 5 minutes, and at once if its run is terminated",
        )
    letters = stream.coordinator.count_dead_letters(info.name, "pending")
    if letters:
        yield Finding(
            "warning",
            "dead-letters",
            subject,
            f"{letters:,} dead letters are pending",
            f"djp dead-letters list {info.name}; then redrive or discard them",
        )
    old = [one for one in stream.coordinator.requests(info.name) if now - one.created_micros > OLD_REQUEST_S * 1e6]
    if old:
        yield Finding(
            "warning",
            "open-requests",
            subject,
            f"{len(old)} requests ({', '.join(sorted({one.kind for one in old}))}) are open, the oldest for "
            f"{_span((now - old[0].created_micros) / 1e6)}",
            "a worker, or the next run, does them: start one",
        )


def _lost_records(stream: EventStream, info: GroupInfo, subject: str) -> Iterator[Finding]:
    spans = stream.log.spans(info.topics)
    for at, committed in stream.positions(info.name).items():
        if at in spans and committed < spans[at].begin:
            yield Finding(
                "problem",
                "below-retention",
                subject,
                f"records {committed} to {spans[at].begin - 1} of topic {at.topic} partition {at.partition} went by "
                "the retention cap before the group had done them",
                f"djp seek {info.name} --to earliest, and raise the topic's retention_cap",
            )


def _examine_intent(subject: str, intent: Intent, tasks: Sequence[TaskInfo], now: int) -> Iterator[Finding]:
    name = f"batch {intent.batch_id[:12]} ({intent.kind}, tasks {_tasks(intent.tasks)}, attempt {intent.attempt})"
    mine = [task for task in tasks if task.task in intent.tasks]
    expired = [task for task in mine if task.owner is not None and not is_held(task, now)]
    if expired:
        since_s = (now - min(task.expires_micros for task in expired)) / 1e6
        yield Finding(
            "problem" if since_s > TAKEOVER_S else "warning",
            "holder-vanished",
            subject,
            f"{name}: its holder {expired[0].owner} vanished {_span(since_s)} ago, and nobody has taken over",
            "start a worker or a run of the group; it finishes the batch unchanged",
        )
    if intent.failures + intent.deaths >= MANY_FAILURES:
        yield Finding(
            "problem",
            "batch-fails",
            subject,
            f"{name}: failed {intent.failures} times, and {intent.deaths} processes died at it",
            "see the log of its run or worker; djp seek past it only if its records may be lost",
        )
    age_s = (now - intent.now_micros) / 1e6
    if age_s > LONG_BATCH_S:
        holders = sorted({task.owner for task in mine if task.owner is not None and is_held(task, now)})
        yield Finding(
            "warning",
            "long-batch",
            subject,
            f"{name}: open for {_span(age_s)}, held by {', '.join(holders) or 'nobody'}",
            "see what its handler waits for; a smaller max_batch makes shorter batches"
            if holders
            else "start a worker or a run of the group",
        )


def is_held(task: TaskInfo, now_micros: int) -> bool:
    """Whether a live lease is on the task."""
    return task.owner is not None and task.expires_micros > now_micros


def _require_writable(stream: EventStream) -> None:
    """Begin and end a write that changes nothing.

    Raises:
        StreamNotWritableError, StreamBusyError, StreamUnavailableError: why it cannot be written.
    """
    from djp_dagster.streams.sql.schema import meta

    database: Any = getattr(stream.log, "database", None)
    if database is not None:
        with database.write() as connection:
            connection.execute(sa.select(meta.c.key).with_for_update()).all()


def _tasks(tasks: Sequence[int]) -> str:
    return str(tasks[0]) if len(tasks) == 1 else f"{tasks[0]}-{tasks[-1]}"


def _span(seconds: float) -> str:
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"
