"""Garbage collection: payloads that nothing refers to any more are condemned first, and deleted a grace period later.

Whoever keeps references to payloads of a store is one of its *rooms* and has written down its name there
(`PayloadStore.announce`). Collection asks every room for everything that may hold a reference, and looks for keys of
payloads in these bytes, wherever they stand: in a claim, in an output's reference, inside the data of an event. So it
may keep too much, and never too little.

What a collection does
    1. It refuses if a room that has announced itself is not among those it can ask; if none has, nothing proves that
       the store is one. Before it writes anything it makes sure that conditional writes are atomic here.
    2. It lists the payloads stored longer than the grace period ago. Keys that are not of its own making are counted,
       and left alone.
    3. It asks the rooms, each as of one moment after 2, and drops what they name.
    4. In one step of the list of condemned objects (`djp_dagster.claim_check.condemned`): what is on it and is named
       again, or is gone, comes off; what was condemned a grace period before 2 began, and is still not named, is marked
       as being deleted; what is new is condemned.
    5. It deletes what it marked, then takes it off the list. *A crash between 4 and the end of 5 leaves marked objects:
       nobody can begin to rely on them, and a collection a grace period later deletes them.*
    6. What expired a grace period ago is deleted, and unfinished uploads that old.

Why no payload in use is deleted
    A writer stores a payload (or finds it stored), then makes the claim visible within the grace period: call that the
    writer's bound. A *new* object is younger than the grace period until then, so 2 does not see it. An *old* one that
    the writer finds there is looked up in the list first, which the writer knows as of at most `KNOWN_FOR_S` ago: if it
    is condemned, the writer takes it off, by compare and set; if it is being deleted, the writer stores a copy under
    another key. If it was condemned only after the writer looked, then 4 marks it, at the earliest, a grace period and
    `KNOWN_FOR_S` later: by then the claim is visible and 3 finds it. A *reader* that holds a claim which is no longer
    visible anywhere has at least a grace period to finish.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import islice
from typing import Protocol
from uuid import uuid4

import msgspec

from djp_dagster.claim_check.condemned import KNOWN_FOR_S, Condemned, Sentence, Sentences
from djp_dagster.claim_check.objects import DocumentChanged, ObjectInfo, ObjectStore
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.errors import CollectionRefusedError, InvalidSettingError, PayloadStoreRefusedError
from djp_dagster.units import Duration, parse_seconds

MIN_GRACE_S = 10 * KNOWN_FOR_S
_AT_ONCE = 250_000
_MOST = 50_000
_RACERS = 8
_CONTENT = r"sha256/[0-9a-f]{2}/[0-9a-f]{62}(?:\.[0-9a-f]{12})?(?:\.zst)?"
_EXPIRING = rf"expiring/\d{{4}}-\d\d-\d\d/{_CONTENT}"
_ATTEMPT = r"attempts/[A-Za-z0-9_.\-=/]+"
_OWN = re.compile(rf"{_CONTENT}|{_EXPIRING}|{_ATTEMPT}")
_NAMED = re.compile(rf"{_EXPIRING}|{_CONTENT}|{_ATTEMPT}".encode())
_STATE = ("pointers/", "rooms/", "gc/")


class Room(Protocol):
    """Somebody who keeps references to payloads of a store."""

    @property
    def name(self) -> str:
        """As it was announced."""

    def references(self) -> Iterator[bytes]:
        """Everything that may hold a reference, as of one moment after this is called."""


class Garbage(msgspec.Struct, frozen=True):
    """A payload nothing refers to. ``fate``: condemned, waiting (for the grace period), deleted, or expired."""

    key: str
    bytes: int
    stored_at: datetime
    fate: str


class CollectionReport(msgspec.Struct, frozen=True):
    """What a collection found and did; in a dry run, what it would do.

    Attributes:
        payloads, payload_bytes: all payloads of the store.
        young: stored within the grace period: not looked at.
        in_use: older ones that something refers to.
        garbage: the others, at most 50,000 a run.
        pardoned: condemned ones that something refers to again.
        unfinished: uploads that were begun and never finished.
        foreign: objects that are not of this package's making: left alone.
    """

    dry_run: bool
    payloads: int
    payload_bytes: int
    young: int
    in_use: int
    garbage: Sequence[Garbage]
    pardoned: int
    unfinished: int
    foreign: int

    def count(self, *fates: str) -> tuple[int, int]:
        """How many payloads met such a fate, and their bytes."""
        chosen = [found.bytes for found in self.garbage if found.fate in fates]
        return len(chosen), sum(chosen)


def collect(
    store: PayloadStore, rooms: Sequence[Room], *, grace: Duration = "1d", dry_run: bool = True
) -> CollectionReport:
    """Find payloads that nothing refers to, and delete those condemned a grace period ago.

    Run it regularly, e.g. daily: what one run condemns, a later one deletes. Safe beside writers, readers and other
    collections. The protocol is in the docstring of this module.

    Args:
        store: whose payloads.
        rooms: who keeps references to them.
        grace: the longest time between storing a payload and making its claim visible, and how long a reader may take;
            at least 10 minutes.
        dry_run: change nothing, only report.

    Raises:
        CollectionRefusedError: a room is missing, or the store's conditional writes are not atomic.
        PayloadStoreUnavailableError, StreamUnavailableError: nothing wrong was deleted; run it again.
    """
    grace_s = parse_seconds(grace, name="grace")
    if grace_s < MIN_GRACE_S:
        raise InvalidSettingError(
            f"grace={grace!r} must be at least {MIN_GRACE_S:.0f} s: writers go by what they read of the list of "
            f"condemned payloads for {KNOWN_FOR_S:.0f} s",
            setting="grace",
            value=grace,
        )
    return _Collection(store, rooms, grace_s, dry_run).run()


class _Collection:
    def __init__(self, store: PayloadStore, rooms: Sequence[Room], grace_s: float, dry_run: bool) -> None:
        self._store, self._objects, self._rooms = store, store.objects, rooms
        self._grace_s, self._dry_run = grace_s, dry_run
        self._payloads = self._bytes = self._young = self._foreign = self._in_use = 0

    def run(self) -> CollectionReport:
        self._require_rooms()
        if not self._dry_run:
            require_atomic(self._objects)
        self._now = self._objects.now()
        unnamed: dict[str, ObjectInfo] = {}
        expired: list[ObjectInfo] = []
        for chunk in _chunks(self._old_payloads(), _AT_ONCE):
            expired += [found for found in chunk if self._has_expired(found.key)]
            candidates = {found.key: found for found in chunk if not found.key.startswith("expiring/")}
            for key in self._named():
                self._in_use += candidates.pop(key, None) is not None
            unnamed.update(islice(candidates.items(), max(0, _MOST - len(unnamed))))
        condemned = Condemned(self._objects)
        before = condemned.read()
        fates = {key: self._fate(before.get(key)) for key in unnamed}
        if not self._dry_run:
            self._execute(condemned, fates, expired)
        garbage = [_garbage(found, fates[found.key]) for found in unnamed.values()]
        garbage += [_garbage(found, "expired") for found in expired]
        return CollectionReport(
            dry_run=self._dry_run,
            payloads=self._payloads,
            payload_bytes=self._bytes,
            young=self._young,
            in_use=self._in_use,
            garbage=garbage,
            pardoned=sum(key not in unnamed for key in before),
            unfinished=self._objects.abandoned_uploads(self._grace_s, remove=not self._dry_run),
            foreign=self._foreign,
        )

    def _require_rooms(self) -> None:
        announced, known = self._store.rooms(), {room.name for room in self._rooms}
        if not announced:
            raise CollectionRefusedError(
                f"nobody has announced to keep references into {self._store.uri}: it is no payload store, or an empty "
                "one; name the store itself, with the prefix of the stream or of the assets",
                uri=self._store.uri,
            )
        if missing := announced - known:
            raise CollectionRefusedError(
                f"{sorted(missing)} keep references into {self._store.uri} and cannot be asked here, only "
                f"{sorted(known)}; run the collection where all of them can be asked",
                uri=self._store.uri,
                missing=sorted(missing),
            )

    def _old_payloads(self) -> Iterator[ObjectInfo]:
        for found in self._objects.list():
            if _OWN.fullmatch(found.key):
                self._payloads += 1
                self._bytes += found.bytes
                if found.modified < self._now - self._grace_s:
                    yield found
                else:
                    self._young += 1
            elif not found.key.startswith(_STATE):
                self._foreign += 1

    def _has_expired(self, key: str) -> bool:
        if not key.startswith("expiring/"):
            return False
        day = datetime.strptime(key.split("/")[1], "%Y-%m-%d").replace(tzinfo=timezone.utc)
        return day.timestamp() < self._now - self._grace_s

    def _named(self) -> Iterator[str]:
        for room in self._rooms:
            for held in room.references():
                for key in _NAMED.findall(held):
                    yield key.decode()

    def _fate(self, sentence: Sentence | None) -> str:
        if sentence is None:
            return "condemned"
        # Of one that is being deleted: by whoever marked it, unless that one died.
        return "deleted" if sentence.since + self._grace_s + KNOWN_FOR_S <= self._now else "waiting"

    def _execute(self, condemned: Condemned, fates: dict[str, str], expired: Sequence[ObjectInfo]) -> None:
        at = self._objects.now()

        def judge(sentences: Sentences) -> bool:
            for key in sentences.keys() - fates.keys():
                if not sentences[key].deleting or self._fate(sentences[key]) == "deleted":
                    del sentences[key]
            for key, fate in fates.items():
                if fate == "condemned":
                    sentences.setdefault(key, Sentence(at))
                elif fate == "deleted" and key in sentences:
                    sentences[key] = Sentence(at, deleting=True)
                elif fate == "deleted":
                    fates[key] = "waiting"  # a writer has taken it off the list meanwhile
            return True

        condemned.change(judge)
        deleted = [key for key, fate in fates.items() if fate == "deleted"]
        self._objects.delete([*deleted, *(found.key for found in expired)])

        def close(sentences: Sentences) -> bool:
            found = sentences.keys() & set(deleted)
            for key in found:
                del sentences[key]
            return bool(found)

        condemned.change(close)


def _garbage(found: ObjectInfo, fate: str) -> Garbage:
    return Garbage(found.key, found.bytes, datetime.fromtimestamp(found.modified, timezone.utc), fate)


def _chunks(found: Iterable[ObjectInfo], size: int) -> Iterator[list[ObjectInfo]]:
    rest = iter(found)
    while chunk := list(islice(rest, size)):
        yield chunk


def require_atomic(objects: ObjectStore) -> None:
    """Make sure, by a race, that of several conditional writes of one document exactly one succeeds.

    Raises:
        CollectionRefusedError: they are not atomic here, or not conditional at all.
    """
    key = f"gc/race-{uuid4().hex}"
    start = threading.Barrier(_RACERS)

    def create(number: int) -> bool:
        start.wait()
        try:
            objects.write_document(key, b"%d" % number, expected=None)
        except DocumentChanged:
            return False
        return True

    try:
        with ThreadPoolExecutor(_RACERS, thread_name_prefix="djp-race") as pool:
            winners = sum(pool.map(create, range(_RACERS)))
    except PayloadStoreRefusedError as error:
        raise _not_atomic(objects, f"it refuses them ({error})") from error
    finally:
        objects.delete([key])
    if winners != 1:
        raise _not_atomic(objects, f"of {_RACERS} writers of one new document {winners} succeeded")


def _not_atomic(objects: ObjectStore, why: str) -> CollectionRefusedError:
    return CollectionRefusedError(
        f"{objects.uri} has no atomic conditional writes: {why}; collect garbage of this store with its own means, or "
        "use a server that has them (AWS S3, SeaweedFS, MinIO, R2)",
        uri=objects.uri,
    )
