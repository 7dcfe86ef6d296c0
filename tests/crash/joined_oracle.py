"""What must be true of the world of joins when all is done, told by sqlite3 and MessagePack alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tests.crash.oracle import DATA, ID, Books, check_local_files, check_snapshots, decoded

PARTS = ("images", "metadata", "video")
STATEFUL = ("create", "catalog", "sellers")
Position = tuple[str, int, int]


@dataclass
class Fate:
    """What the stored append times make of one product."""

    first: int
    task: int
    status: str = "pending"
    parts: dict[str, Position] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    unfit: bool = False


class JoinedBooks(Books):
    """The stream file of the world of joins.

    Args:
        until_expired: nothing is done before the last deadline has fired.
    """

    def __init__(self, folder: Path, *, until_expired: bool = True) -> None:
        super().__init__(folder)
        self.until_expired = until_expired

    def is_done(self) -> bool:
        return super().is_done() and not (self.until_expired and self.deadlines("create"))

    def fates(self, deadline_s: float) -> dict[str, Fate]:
        """The join's rule: of the parts in the order of their append times, those count that are not late."""
        stored = [(stamp, topic, o, p, event) for topic in PARTS for p, o, stamp, event in self.stamped(topic)]
        fates: dict[str, Fate] = {}
        for stamp, topic, offset, partition, event in sorted(stored, key=lambda found: found[:3]):
            product = event[DATA]["product"]
            fate = fates.setdefault(product, Fate(stamp, partition, unfit=event[DATA]["fate"] == "unfit"))
            assert fate.task == partition, f"parts of {product} lie in different partitions"
            if fate.status == "pending" and stamp > fate.first + round(deadline_s * 1e6):
                fate.status = "expired"
            if fate.status != "pending":
                fate.late.append(event[ID])
            elif topic not in fate.parts:
                fate.parts[topic] = (topic, partition, offset)
                if len(fate.parts) == len(PARTS):
                    fate.status = "failed" if fate.unfit else "completed"
        if self.until_expired:
            for fate in fates.values():
                fate.status = "expired" if fate.status == "pending" else fate.status
        return fates

    def last_sequence(self, producer: str) -> int:
        """The number of its last publish."""
        rows = self.db.execute("SELECT last_sequence FROM djp_producers WHERE name = ?", (producer,)).fetchone()
        return int(rows[0])

    def letters(self, group: str) -> list[tuple[str, int, int, int, bytes, str]]:
        """Dead letters: topic, partition, offset, append time, the event's bytes, the type of the error."""
        return self.db.execute(
            'SELECT topic, partition, "offset", append_micros, raw, error_type FROM djp_dead_letters '
            "JOIN djp_groups USING (group_id) WHERE name = ?",
            (group,),
        ).fetchall()


def by_status(fates: Mapping[str, Fate]) -> dict[str, set[str]]:
    """The products that came to each end."""
    found: dict[str, set[str]] = {status: set() for status in ("completed", "expired", "failed", "pending")}
    for product, fate in fates.items():
        found[fate.status].add(product)
    return found


def check(books: JoinedBooks, published: Mapping[int, Any], deadline_s: float) -> dict[str, Fate]:
    """Every part made once, every product completed, failed or expired once; what follows from it; how it ended."""
    assert books.everything_done()
    _check_parts(books, published)
    fates = books.fates(deadline_s)
    _check_products(books, fates)
    _check_dead_letters(books, fates)
    late = [event[ID] for _, _, event in books.topic("late-parts")]
    _require_equal(Counter(late), Counter(one for fate in fates.values() for one in fate.late), "late parts")
    emitted = [event[ID] for topic in (*PARTS, "products") for _, _, event in books.topic(topic)]
    assert len(set(emitted)) == len(emitted), "two emitted events share an id"
    _check_buffer(books, fates)
    _check_catalog(books)
    _check_sellers(books)
    for group in STATEFUL:
        check_snapshots(books, group, keep=2)
    assert check_local_files(books, STATEFUL), "no local state has come to the end of its changelog"
    return fates


def _require_equal(found: Counter[Any], wanted: Counter[Any], what: str) -> None:
    missing, extra = wanted - found, found - wanted
    assert not missing, f"{what} missing: {dict(missing)}"
    assert not extra, f"{what} too many: {dict(extra)}"


def _check_parts(books: JoinedBooks, published: Mapping[int, Any]) -> None:
    """Every upload is there once, and has led to one part of each kind, in order; video refuses some."""
    uploads = books.topic("uploads")
    assert Counter(event[DATA]["n"] for _, _, event in uploads) == Counter(published.keys())
    assert all(event[DATA] == published[event[DATA]["n"]] for _, _, event in uploads)
    refused = []
    for name in PARTS:
        wanted = []
        for partition, offset, event in uploads:
            if name == "video" and event[DATA]["fate"] in ("poison", "refused"):
                refused.append((partition, offset))
            elif name in event[DATA]["parts"]:
                wanted.append((partition, event[DATA]["n"]))
        made = [(partition, event[DATA]["n"]) for partition, _, event in books.topic(name)]
        assert made == wanted, f"parts {name}: missing, too many, or out of order"
    assert sorted(books.dead_letters("video")) == sorted(refused)
    assert all(books.dead_letters(group) == [] for group in ("metadata", "images", "catalog", "sellers"))


def _check_products(books: JoinedBooks, fates: Mapping[str, Fate]) -> None:
    """Two versions of every completed product, of the parts that the append times say; nothing of any other."""
    found: dict[str, list[Any]] = {}
    for _, _, event in books.topic("products"):
        found.setdefault(event[DATA]["product"], []).append(event[DATA])
    assert found.keys() == by_status(fates)["completed"]
    for product, versions in found.items():
        where = {topic: [partition, offset] for topic, partition, offset in fates[product].parts.values()}
        assert sorted(one["version"] for one in versions) == [1, 2], f"{product} was completed more than once"
        pages = [one["page"] for one in versions if one["page"] is not None]
        assert pages
        assert all(page["where"] == where for page in pages), f"{product} was made of other parts"


def _check_dead_letters(books: JoinedBooks, fates: Mapping[str, Fate]) -> None:
    """All parts of products that expired or failed, each once, as they were appended; no other."""
    wanted = {
        position: "JoinIncompleteError" if fate.status == "expired" else "ValueError"
        for fate in fates.values()
        if fate.status in ("expired", "failed")
        for position in fate.parts.values()
    }
    letters = books.letters("create")
    _require_equal(Counter(letter[:3] for letter in letters), Counter(wanted.keys()), "dead letters")
    stored = {(topic, p, o): (stamp, event) for topic in PARTS for p, o, stamp, event in books.stamped(topic)}
    for topic, partition, offset, stamp, raw, error in letters:
        position = (topic, partition, offset)
        assert (stamp, msgspec.msgpack.decode(raw)) == stored[position], f"the dead letter of {position} is another"
        assert error == wanted[position]


def _check_buffer(books: JoinedBooks, fates: Mapping[str, Fate]) -> None:
    """A mark for every product that is done, the parts of those that wait, a summary that counts them; nothing else."""
    for task in books.tasks("create"):
        state = decoded(books.state("create", task))
        mine = {product: fate for product, fate in fates.items() if fate.task == task}
        ended = by_status(mine)
        summary = state.pop(b"s", {})
        dues = {key for key in state if isinstance(key, bytes)}
        assert len(dues) == len(ended["pending"]), f"task {task} has an index of keys that are done"
        for product, fate in mine.items():
            kept = state[product]
            if fate.status == "pending":
                assert sorted(kept[2]) == sorted(fate.parts)
            else:
                assert kept[0] == fate.status
        assert state.keys() - dues == mine.keys()
        if mine:
            counted = {status: len(ended[status]) for status in ("completed", "expired", "failed")}
            assert {status: summary[status] for status in counted} == counted
            assert summary["open"] == len(ended["pending"])
            assert summary["late"] == sum(len(fate.late) for fate in mine.values())
            assert bool(summary["bytes"]) == bool(ended["pending"])


def catalog_of(books: JoinedBooks) -> dict[str, Any]:
    """The table as it must be: of each product the highest version."""
    table: dict[str, Any] = {}
    for _, _, event in books.topic("products"):
        data = event[DATA]
        if data["version"] >= table.get(data["product"], [0])[0]:
            table[data["product"]] = [data["version"], data["page"]]
    return table


def sellers_of(books: JoinedBooks, task: int) -> dict[str, int]:
    """How many products each seller must have in a task."""
    found = Counter(
        event[DATA]["seller"]
        for partition, _, event in books.topic("products")
        if partition == task and event[DATA]["version"] == 1
    )
    return dict(found)


def _check_catalog(books: JoinedBooks) -> None:
    assert books.changelog("catalog") == catalog_of(books)


def _check_sellers(books: JoinedBooks) -> None:
    for task in books.tasks("sellers"):
        assert decoded(books.state("sellers", task)) == sellers_of(books, task)
