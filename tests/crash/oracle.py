"""What must be true of a stream file when all is done, told by sqlite3 and MessagePack alone, not by this project."""

import hashlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

ID, SOURCE, TYPE, DATA = 0, 1, 2, 3
REMEMBERED = 10
"""So many orders of a user are in the state of ``counts``."""
RawState = dict[bytes, bytes]


class Known(NamedTuple):
    """A snapshot that the stream knows."""

    offset: int
    epoch: int
    path: Path


class LocalFile(NamedTuple):
    """A file of local state, of whichever process."""

    path: Path
    group: str
    task: int


class Books:
    """The stream file of a crash test, opened read-only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.db = sqlite3.connect(f"file:{folder / 'stream.db'}?mode=ro", uri=True, timeout=30)

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def moment(self) -> Iterator[None]:
        """Within the block every look sees the file as it was at the first."""
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.execute("ROLLBACK")

    def stamped(self, name: str) -> list[tuple[int, int, int, list[Any]]]:
        """(partition, offset, append time, event) of every record, checking that offsets have no holes."""
        rows = self.db.execute(
            "SELECT r.partition, base_offset, r.count, append_micros, blob FROM djp_record_batches r "
            "JOIN djp_topics USING (topic_id) WHERE name = ? ORDER BY r.partition, base_offset",
            (name,),
        )
        records: list[tuple[int, int, int, list[Any]]] = []
        expected: dict[int, int] = defaultdict(int)
        for partition, base, count, stamp, blob in rows:
            assert base == expected[partition], f"hole in {name}/{partition} at {base}"
            events = msgspec.msgpack.decode(blob)
            assert len(events) == count
            records.extend((partition, base + index, stamp, event) for index, event in enumerate(events))
            expected[partition] += count
        return records

    def topic(self, name: str) -> list[tuple[int, int, list[Any]]]:
        """(partition, offset, event) of every record."""
        return [(partition, offset, event) for partition, offset, _, event in self.stamped(name)]

    def committed(self) -> dict[tuple[str, str, int], int]:
        """Committed offset by (group, topic, partition)."""
        rows = self.db.execute(
            "SELECT g.name, t.name, p.partition, committed FROM djp_positions p JOIN djp_groups g USING (group_id) "
            "JOIN djp_topics t USING (topic_id)"
        )
        return {(group, topic, partition): offset for group, topic, partition, offset in rows}

    def payload(self, reference: str) -> Path:
        """The file of a payload."""
        (store,) = (self.folder / "stream-payloads").glob("[!.]*")
        return store / str(json.loads(reference)["key"])

    def outputs(self, group: str) -> list[dict[str, Any]]:
        """The committed outputs, read from their files."""
        rows = self.db.execute(
            "SELECT payload FROM djp_outputs JOIN djp_groups USING (group_id) WHERE name = ? ORDER BY sequence",
            (group,),
        )
        return [json.loads(self.payload(payload).read_bytes()) for (payload,) in rows]

    def dead_letters(self, group: str) -> list[tuple[int, int]]:
        rows = self.db.execute(
            'SELECT partition, "offset" FROM djp_dead_letters JOIN djp_groups USING (group_id) WHERE name = ?', (group,)
        )
        return list(rows)

    def open_intents(self) -> list[tuple[str, int]]:
        return list(self.db.execute("SELECT batch_id, attempt FROM djp_intents"))

    def snapshots(self, group: str, task: int) -> list[Known]:
        """Those the stream knows of the task's state, oldest first."""
        rows = self.db.execute(
            "SELECT changelog_offset, epoch, payload FROM djp_snapshots JOIN djp_groups g USING (group_id) "
            "JOIN djp_topics t ON t.topic_id = changelog_id WHERE g.name = ? AND t.name = ? AND task = ? ORDER BY id",
            (group, f"__changelog.{group}", task),
        )
        return [Known(offset, epoch, self.payload(payload)) for offset, epoch, payload in rows]

    def changelog_span(self, group: str, task: int) -> tuple[int, int]:
        """Where the changelog of the task begins and ends."""
        (span,) = self.db.execute(
            "SELECT begin_offset, end_offset FROM djp_partitions p JOIN djp_topics USING (topic_id) "
            "WHERE name = ? AND p.partition = ?",
            (f"__changelog.{group}", task),
        )
        begin, end = span
        return begin, end

    def tasks(self, group: str) -> range:
        """The tasks of a group."""
        (count,) = self.db.execute("SELECT tasks FROM djp_groups WHERE name = ?", (group,)).fetchone()
        return range(count)

    def fold(self, group: str, task: int, state: RawState, start: int, end: int) -> RawState:
        """``state`` at changelog offset ``start``, as it is at ``end``: the last change of each key wins."""
        rows = self.db.execute(
            "SELECT base_offset, r.count, blob FROM djp_record_batches r JOIN djp_topics USING (topic_id) "
            "WHERE name = ? AND r.partition = ? AND base_offset + r.count > ? AND base_offset < ? ORDER BY base_offset",
            (f"__changelog.{group}", task, start, end),
        )
        at, state = start, dict(state)
        for base, count, blob in rows:
            assert base <= at, f"the changelog of {group}/{task} has a hole before {base}"
            for key, value in msgspec.msgpack.decode(blob)[at - base : end - base]:
                if value is None:
                    state.pop(key, None)
                else:
                    state[key] = value
            at = min(base + count, end)
        assert at == end, f"the changelog of {group}/{task} ends at {at}, not {end}"
        return state

    def state(self, group: str, task: int) -> RawState:
        """A task's state: its newest readable snapshot, and what the changelog has after it; encoded."""
        _, end = self.changelog_span(group, task)
        start, state = 0, RawState()
        for known in reversed(self.snapshots(group, task)):
            if is_whole(known.path):
                start, state = read_state(known.path, immutable=True)
                break
        return self.fold(group, task, state, start, end)

    def changelog(self, group: str) -> dict[Any, Any]:
        """The state of a group, all tasks together, decoded; no key may be in two of them."""
        states = [decoded(self.state(group, task)) for task in self.tasks(group)]
        merged = {key: value for state in states for key, value in state.items()}
        assert len(merged) == sum(map(len, states)), f"tasks of {group} share keys"
        return merged

    def deadlines(self, group: str) -> dict[str, int]:
        rows = self.db.execute(
            "SELECT key, count(*) FROM djp_deadlines JOIN djp_groups USING (group_id) WHERE name = ? GROUP BY key",
            (group,),
        )
        return dict(rows)

    def local_files(self) -> list[LocalFile]:
        """All files of local state below the folder, replicas too; half-made copies are none."""
        paths = sorted(self.folder.glob("*/*/*/*.db"))
        return [LocalFile(path, path.parent.name, int(path.stem.removeprefix("replica-"))) for path in paths]

    def everything_done(self) -> bool:
        """Whether every group has committed every record, and no batch is open."""
        with self.moment():
            return self.is_done()

    def is_done(self) -> bool:
        """The same, as of the moment looked at."""
        ends = {
            (name, partition): end
            for name, partition, end in self.db.execute(
                "SELECT name, p.partition, end_offset FROM djp_partitions p JOIN djp_topics USING (topic_id)"
            )
        }
        committed = self.committed()
        return (
            bool(committed)
            and not self.open_intents()
            and all(offset == ends[topic, partition] for (_, topic, partition), offset in committed.items())
        )


def is_whole(path: Path) -> bool:
    """Whether a payload is there, with the content that its name says."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == f"{path.parent.name}{path.name}"


def read_state(path: Path, *, immutable: bool = False) -> tuple[int, RawState]:
    """The changelog offset of a state file, and its keys and values, whose checksums are checked."""
    options = "mode=ro&immutable=1" if immutable else "mode=rw"  # which lets SQLite undo what a death left half done
    with closing(sqlite3.connect(f"file:{path}?{options}", uri=True, timeout=30)) as db:
        db.execute("BEGIN")
        if not immutable and db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            return 0, {}  # its maker died before the first commit
        ((offset,),) = db.execute("SELECT changelog_offset FROM lineage")
        rows = db.execute("SELECT key, value FROM kv").fetchall()
    state = {}
    for key, sealed in rows:
        value, checksum = sealed[:-4], sealed[-4:]
        assert crc32(key, crc32(value)) == int.from_bytes(checksum, "big"), f"{path}: the value of {key!r} is damaged"
        state[key] = value
    return offset, state


def decoded(state: RawState) -> dict[Any, Any]:
    """Keys and values as the handler knows them."""
    return {decode_key(key): msgspec.msgpack.decode(value) for key, value in state.items()}


def decode_key(encoded: bytes) -> Any:
    """A key of state: a kind, then its bytes."""
    kind, rest = encoded[0], encoded[1:]
    if kind == 0x40:
        return tuple(_parts(rest))
    return rest.decode() if kind == 0x20 else _integer(rest) if kind == 0x10 else rest


def _integer(raw: bytes) -> int:
    assert len(raw) == 9
    return int.from_bytes(raw, "big") - 2**63


def _parts(rest: bytes) -> Iterator[str | int]:
    """The parts of a tuple; these tests have strings without zero bytes, and integers."""
    while rest:
        if rest[0] == 0x10:
            yield _integer(rest[1:10])
            rest = rest[10:]
        else:
            assert rest[0] == 0x20
            text, _, rest = rest[1:].partition(b"\x00")
            yield text.decode()


def check_snapshots(books: Books, group: str, *, keep: int) -> int:
    """Every known snapshot is whole, follows the one before it, and can be continued; how many there are."""
    found = 0
    for task in books.tasks(group):
        known = books.snapshots(group, task)
        begin, end = books.changelog_span(group, task)
        assert len(known) <= keep
        assert begin <= (known[0].offset if len(known) == keep else 0), f"{group}/{task}: the changelog lacks a part"
        assert [one.epoch for one in known] == sorted(one.epoch for one in known), "a fenced holder made one known"
        before, state = (0, RawState()) if begin == 0 else read_state(known[0].path, immutable=True)
        for one in known:
            assert is_whole(one.path), f"{one.path} is damaged"
            offset, held = read_state(one.path, immutable=True)
            assert before <= offset == one.offset <= end
            assert held == books.fold(group, task, state, before, offset), f"a snapshot of {group}/{task} is wrong"
            before, state = offset, held
        found += len(known)
    return found


def check_local_files(books: Books, groups: Sequence[str]) -> int:
    """No file is ahead of its changelog, and those at its end hold what it says, to the byte; how many those are."""
    truth = {(group, task): books.state(group, task) for group in groups for task in books.tasks(group)}
    at_the_end = 0
    for file in books.local_files():
        offset, state = read_state(file.path)
        _, end = books.changelog_span(file.group, file.task)
        assert offset <= end, f"{file.path} is ahead"
        if offset == end:
            assert state == truth[file.group, file.task], f"{file.path} is wrong"
            at_the_end += 1
    return at_the_end


def check(books: Books, acknowledged: set[int]) -> None:
    """Every acknowledged event handled, no committed effect missing or double, order kept."""
    orders = books.topic("orders")
    numbers = Counter(event[DATA]["n"] for _, _, event in orders)
    assert all(count == 1 for count in numbers.values()), "an event was appended twice"
    assert acknowledged <= numbers.keys(), "an acknowledged event is not in the stream"
    assert books.everything_done()
    good = {(p, o): e[DATA] for p, o, e in orders if e[DATA]["kind"] == "good"}
    per_user: dict[str, list[int]] = defaultdict(list)
    for _, data in sorted(good.items()):
        per_user[data["user"]].append(data["n"])
    _check_counts(books, per_user)
    _check_counts_state(books, per_user)
    assert sorted(books.dead_letters("counts")) == sorted((p, o) for p, o, _ in orders if (p, o) not in good)
    assert books.dead_letters("files") == books.dead_letters("relay") == []
    for group, wanted in (("counts", sorted(good)), ("files", sorted((p, o) for p, o, _ in orders))):
        seen = [tuple(position) for output in books.outputs(group) for position in output["seen"]]
        assert sorted(seen) == wanted, f"an order is not in exactly one committed output of {group}"
    _check_relay(books)


def _check_counts(books: Books, per_user: dict[str, list[int]]) -> None:
    """One emit per good order, numbered per user in the order of the input."""
    emitted: dict[str, list[tuple[int, int]]] = defaultdict(list)
    counted = books.topic("counted")
    for _, _, event in counted:
        emitted[event[DATA]["user"]].append((event[DATA]["count"], event[DATA]["n"]))
    for user in sorted(per_user.keys() | emitted.keys()):
        got, wanted = [n for _, n in emitted[user]], per_user[user]
        missing, extra = Counter(wanted) - Counter(got), Counter(got) - Counter(wanted)
        assert got == wanted, f"{user}: emits missing {dict(missing)}, too many {dict(extra)}, or out of order"
    assert all([count for count, _ in pairs] == list(range(1, len(pairs) + 1)) for pairs in emitted.values())
    assert len({event[ID] for _, _, event in counted}) == len(counted), "two emitted events share an id"


def _check_counts_state(books: Books, per_user: dict[str, list[int]]) -> None:
    """How many orders each user has, and the last of them: in the changelog, in snapshots, in local files."""
    wanted: dict[Any, Any] = {user: len(numbers) for user, numbers in per_user.items()}
    for user, numbers in per_user.items():
        last = list(enumerate(numbers, start=1))[-REMEMBERED:]
        wanted.update({(user, count): {"n": n, "note": f"order {n} of {user}" * 3} for count, n in last})
    assert books.changelog("counts") == wanted
    assert books.deadlines("counts") == dict.fromkeys(per_user, 1)
    check_snapshots(books, "counts", keep=2)
    check_local_files(books, ["counts"])


def _check_relay(books: Books) -> None:
    """Everything passed on once, order kept per partition of its input."""
    counted = books.topic("counted")
    final = [event[DATA]["n"] for _, _, event in books.topic("final")]
    assert sorted(final) == sorted(event[DATA]["n"] for _, _, event in counted)
    place = {n: index for index, n in enumerate(final)}
    for partition in {p for p, _, _ in counted}:
        inputs = [place[event[DATA]["n"]] for p, _, event in counted if p == partition]
        assert inputs == sorted(inputs)
