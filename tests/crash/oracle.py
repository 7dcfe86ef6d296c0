"""What must be true of a stream file when all is done, told by sqlite3 and MessagePack alone, not by this project."""

import json
import sqlite3
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import msgspec

ID, SOURCE, TYPE, DATA = 0, 1, 2, 3


class Books:
    """The stream file of a crash test, opened read-only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.db = sqlite3.connect(f"file:{folder / 'stream.db'}?mode=ro", uri=True, timeout=30)

    def close(self) -> None:
        self.db.close()

    def topic(self, name: str) -> list[tuple[int, int, list[Any]]]:
        """(partition, offset, event) of every record, checking that offsets have no holes."""
        rows = self.db.execute(
            "SELECT r.partition, base_offset, r.count, blob FROM djp_record_batches r JOIN djp_topics USING (topic_id) "
            "WHERE name = ? ORDER BY r.partition, base_offset",
            (name,),
        )
        records: list[tuple[int, int, list[Any]]] = []
        expected: dict[int, int] = defaultdict(int)
        for partition, base, count, blob in rows:
            assert base == expected[partition], f"hole in {name}/{partition} at {base}"
            events = msgspec.msgpack.decode(blob)
            assert len(events) == count
            records.extend((partition, base + index, event) for index, event in enumerate(events))
            expected[partition] += count
        return records

    def committed(self) -> dict[tuple[str, str, int], int]:
        """Committed offset by (group, topic, partition)."""
        rows = self.db.execute(
            "SELECT g.name, t.name, p.partition, committed FROM djp_positions p JOIN djp_groups g USING (group_id) "
            "JOIN djp_topics t USING (topic_id)"
        )
        return {(group, topic, partition): offset for group, topic, partition, offset in rows}

    def outputs(self, group: str) -> list[dict[str, Any]]:
        """The committed outputs, read from their files."""
        rows = self.db.execute(
            "SELECT payload FROM djp_outputs JOIN djp_groups USING (group_id) WHERE name = ? ORDER BY sequence",
            (group,),
        )
        (store,) = (
            (self.folder / "stream-payloads").glob("[!.]*") if (self.folder / "stream-payloads").exists() else (None,)
        )
        return [json.loads((store / json.loads(payload)["key"]).read_bytes()) for (payload,) in rows]

    def dead_letters(self, group: str) -> list[tuple[int, int]]:
        rows = self.db.execute(
            'SELECT partition, "offset" FROM djp_dead_letters JOIN djp_groups USING (group_id) WHERE name = ?', (group,)
        )
        return list(rows)

    def open_intents(self) -> list[tuple[str, int]]:
        return list(self.db.execute("SELECT batch_id, attempt FROM djp_intents"))

    def changelog(self, group: str) -> dict[Any, Any]:
        """The state of a group: its changelog folded, last change wins."""
        rows = self.db.execute(
            "SELECT blob FROM djp_record_batches JOIN djp_topics USING (topic_id) WHERE name = ? "
            "ORDER BY partition, base_offset",
            (f"__changelog.{group}",),
        )
        state: dict[Any, Any] = {}
        for (blob,) in rows:
            for key, value in msgspec.msgpack.decode(blob):
                state[msgspec.msgpack.decode(key)] = None if value is None else msgspec.msgpack.decode(value)
        return {key: value for key, value in state.items() if value is not None}

    def deadlines(self, group: str) -> dict[str, int]:
        rows = self.db.execute(
            "SELECT key, count(*) FROM djp_deadlines JOIN djp_groups USING (group_id) WHERE name = ? GROUP BY key",
            (group,),
        )
        return dict(rows)

    def everything_done(self) -> bool:
        """Whether every group has committed every record, and no batch is open."""
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


def check(books: Books, acknowledged: set[int]) -> None:
    """Every acknowledged event handled, no committed effect missing or double, order kept."""
    orders = books.topic("orders")
    numbers = Counter(event[DATA]["n"] for _, _, event in orders)
    assert all(count == 1 for count in numbers.values()), "an event was appended twice"
    assert acknowledged <= numbers.keys(), "an acknowledged event is not in the stream"
    assert books.everything_done()

    good = {(p, o): e[DATA] for p, o, e in orders if e[DATA]["kind"] == "good"}
    bad = sorted((p, o) for p, o, e in orders if e[DATA]["kind"] != "good")

    # counts: one emit per good order, numbered per user in the order of the input.
    per_user: dict[str, list[int]] = defaultdict(list)
    for _, data in sorted(good.items()):
        per_user[data["user"]].append(data["n"])
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

    assert sorted(books.dead_letters("counts")) == bad
    assert books.dead_letters("files") == books.dead_letters("relay") == []
    assert books.changelog("counts") == {user: len(numbers) for user, numbers in per_user.items()}
    assert books.deadlines("counts") == dict.fromkeys(per_user, 1)

    # outputs: every order in exactly one committed output.
    for group, wanted in (("counts", sorted(good)), ("files", sorted((p, o) for p, o, _ in orders))):
        seen = [tuple(position) for output in books.outputs(group) for position in output["seen"]]
        assert sorted(seen) == wanted, group

    # relay: everything passed on once, order kept per partition of its input.
    final = [event[DATA]["n"] for _, _, event in books.topic("final")]
    assert sorted(final) == sorted(event[DATA]["n"] for _, _, event in counted)
    place = {n: index for index, n in enumerate(final)}
    for partition in {p for p, _, _ in counted}:
        inputs = [place[event[DATA]["n"]] for p, _, event in counted if p == partition]
        assert inputs == sorted(inputs)
