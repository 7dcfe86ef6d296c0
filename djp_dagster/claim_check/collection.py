"""Garbage collection: payloads that nothing refers to any more are condemned first, and deleted a grace period later.

Whoever keeps references to payloads of a store is one of its *rooms* and has written down its name there
(`PayloadStore.announce`). Collection asks every room for everything that may hold a reference, and looks for keys of
payloads in these bytes, wherever they stand: in a claim, in an output's reference, inside the data of an event. So it
may keep too much, and never too little. What stands inside a payload, or is written in another way than plainly (in
base64, compressed), it does not see: a claim in there keeps nothing.

What a collection does
    1. It refuses if a room that has announced itself is not among those it can ask; if none has, nothing proves that
       the store is one. Before it writes anything it makes sure that conditional writes are atomic here.
    2. It reads the list of condemned objects (`djp_dagster.claim_check.condemned`), and lists the payloads stored
       longer than the grace period ago. Keys that are not of its own making are counted, and left alone.
    3. It asks the rooms, each as of one moment after 2, and drops what they name.
    4. It changes the list, in one step that decides by the list as it is then. What 2 found on it and is named again,
       gone, or new comes off. What is not on it is *condemned*; since when, the next step says, which has read it
       there. What was condemned half a grace period before 2 began is *confirmed*. What was confirmed half a grace
       period before 2 began is marked as *being deleted*, by this collection.
    5. It deletes what it marked, and 4 again takes that off the list and marks more, until there is no more. Between
       marking and deleting pass `_DELETE_WITHIN_S` at most. *A crash before that leaves marked objects: nobody can
       begin to rely on them, and a collection `_TAKE_OVER_S` later marks them anew and deletes them.*
    6. What expired a grace period ago is deleted, and unfinished uploads that old.

Why no payload in use is deleted
    A *writer* knows the list as of at most `KNOWN_FOR_S` ago when it relies on an object, its own or one that it found;
    it makes the claim visible within the grace period. If the object is condemned, the writer takes it off the list, by
    compare and set; if it is being deleted, the writer stores a copy under another key. If it was condemned only after
    the writer read the list, then 4 marks it after a collection that began a grace period and `_MARGIN_S` later: by
    then the claim is visible, and 3 finds it. A *reader* that holds a claim which is no longer visible anywhere has
    half a grace period to finish, or to make it visible again: when the object was confirmed, every writer who had not
    read that it is condemned was done, if writers take no longer than that, too.

What it relies on
    The rooms' stores are those that hold the truth, not copies of them. No collection stands still for
    `_TAKE_OVER_S` less `_DELETE_WITHIN_S` between asking the time and its request for deletion: nothing on S3 could
    stop that request. The store's clock does not jump by a grace period.
"""

import heapq
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import islice
from typing import Protocol
from uuid import uuid4

import msgspec

from djp_dagster.claim_check.condemned import KNOWN_FOR_S, Condemned, Sentence, Sentences
from djp_dagster.claim_check.conditional import RACE, require_atomic
from djp_dagster.claim_check.objects import ObjectInfo
from djp_dagster.claim_check.references import goes_at, keys_in
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.errors import CollectionRefusedError, InvalidSettingError
from djp_dagster.units import Duration, parse_seconds

MIN_GRACE_S = 10 * KNOWN_FOR_S
_MARGIN_S = 2 * KNOWN_FOR_S
"""For what a writer goes by, and for clocks that count whole seconds or differ a little."""
_DELETE_WITHIN_S = 240.0
_TAKE_OVER_S = 720.0
"""Well above `_DELETE_WITHIN_S`: a request may be repeated, and wait, for minutes."""
_LOOKED_AT_ONCE = 250_000
_MOST_ON_LIST = 200_000
_MARKED_AT_ONCE = 20_000
_DELETED_AT_ONCE = 1000
_SHOWN = 1000
_STATE = ("pointers/", "rooms/", "gc/")
_log = logging.getLogger(__name__)


class Room(Protocol):
    """Somebody who keeps references to payloads of a store."""

    @property
    def name(self) -> str:
        """As it was announced."""

    def references(self) -> Iterator[bytes]:
        """Everything that may hold a reference, as of one moment after this is called."""


class Garbage(msgspec.Struct, frozen=True):
    """A payload nothing refers to.

    ``fate``: ``condemned``; ``waiting`` until it was for long enough; ``deleted``; ``expired``, and deleted, too; or
    ``later``, because more are condemned than one list holds.
    """

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
        garbage: the largest 1,000 of the others.
        counts: of all of those, how many met which fate, and their bytes.
        pardoned: condemned ones that something refers to again, or that are gone.
        unfinished: uploads that were begun and never finished.
        foreign: objects that are not of this package's making: left alone.
    """

    dry_run: bool
    payloads: int
    payload_bytes: int
    young: int
    in_use: int
    garbage: Sequence[Garbage]
    counts: Mapping[str, tuple[int, int]]
    pardoned: int
    unfinished: int
    foreign: int

    def count(self, *fates: str) -> tuple[int, int]:
        """How many payloads met one of the fates, and their bytes."""
        found = [self.counts.get(fate, (0, 0)) for fate in fates]
        return sum(number for number, _ in found), sum(size for _, size in found)


def collect(
    store: PayloadStore, rooms: Sequence[Room], *, grace: Duration = "1d", dry_run: bool = True
) -> CollectionReport:
    """Find payloads that nothing refers to, and delete those condemned a grace period ago.

    Run it regularly, e.g. daily: what one run condemns, the one after the next deletes. Safe beside writers, readers
    and other collections. The protocol is in the docstring of this module.

    Args:
        store: whose payloads.
        rooms: who keeps references to them.
        grace: the longest time between storing a payload and making its claim visible; readers may take half of it.
            At least 10 minutes. Of about 200,000 payloads a grace period the store is rid.
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
        self._condemned = Condemned(store.objects)
        self._name = uuid4().hex
        self._payloads = self._bytes = self._young = self._foreign = self._in_use = 0
        self._now = self._marked_at = 0.0
        self._later = 0, 0
        self._before: Sentences = {}
        self._after: Sentences = {}
        self._unnamed: dict[str, ObjectInfo] = {}
        self._expired: list[ObjectInfo] = []
        self._left_over: list[str] = []
        self._added: set[str] = set()
        self._deleted: set[str] = set()

    def run(self) -> CollectionReport:
        self._require_rooms()
        unfinished = self._objects.abandoned_uploads(self._grace_s, remove=not self._dry_run)
        if not self._dry_run:
            require_atomic(self._objects)
        self._now = self._objects.now()
        self._before = self._condemned.read()
        self._look()
        if not self._dry_run:
            self._execute()
        return self._report(unfinished)

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

    # Steps 2 and 3

    def _look(self) -> None:
        new = 0
        for chunk in _chunks(self._old_payloads(), _LOOKED_AT_ONCE):
            self._expired += [found for found in chunk if found.key.startswith("expiring/")]
            candidates = {found.key: found for found in chunk if not found.key.startswith("expiring/")}
            if candidates:
                self._drop_named(candidates)
            for key, found in candidates.items():
                if key in self._before or new < _MOST_ON_LIST:
                    self._unnamed[key] = found
                    new += key not in self._before
                else:
                    self._later = self._later[0] + 1, self._later[1] + found.bytes

    def _old_payloads(self) -> Iterator[ObjectInfo]:
        oldest = self._now - self._grace_s
        for found in self._objects.list():
            end = goes_at(found.key)
            if end is None:
                self._foreign += not found.key.startswith(_STATE)
                if found.key.startswith(RACE) and found.modified < oldest:
                    self._left_over.append(found.key)
                continue
            self._payloads += 1
            self._bytes += found.bytes
            if found.modified >= oldest:
                self._young += 1
            elif end >= oldest:
                self._in_use += 1
            else:
                yield found

    def _drop_named(self, candidates: dict[str, ObjectInfo]) -> None:
        lengths = sorted({len(key) for key in candidates if key.startswith("attempts/")})
        for room in self._rooms:
            for held in room.references():
                for key in keys_in(held, lengths):
                    self._in_use += candidates.pop(key, None) is not None

    # Steps 4 to 6

    def _execute(self) -> None:
        done: list[str] = []
        while True:
            marked, undated = self._judge(done)
            self._deleted.update(done)
            if not marked and not undated:
                break
            done = self._delete(marked)
        self._objects.delete([*(found.key for found in self._expired), *self._left_over])

    def _judge(self, done: Sequence[str]) -> tuple[list[str], bool]:
        """Change the list: what is marked now, and whether there is something that has no date yet."""
        marked: list[str] = []
        added: list[str] = []

        def edit(sentences: Sentences) -> bool:
            marked.clear()
            added.clear()
            before = dict(sentences)
            at = self._marked_at = self._objects.now()  # what was just read stood there before
            self._take_off(sentences, done)
            for key, sentence in sentences.items():
                if sentence.since is None or sentence.since > at + _MARGIN_S:  # a clock was wrong
                    sentences[key] = msgspec.structs.replace(sentence, since=at)
            for key in self._unnamed:
                found = sentences.get(key)
                fate = self._fate(key, found)
                if fate == "condemned" and len(sentences) < _MOST_ON_LIST:
                    sentences[key] = Sentence()
                    added.append(key)
                elif fate == "deleted" and len(marked) < _MARKED_AT_ONCE:
                    sentences[key] = Sentence(at, deleting=True, by=self._name)
                    marked.append(key)
                elif found is not None and self._is_ripe(found):
                    sentences[key] = Sentence(at, confirmed=True)
            return sentences != before

        self._after = self._condemned.change(edit)
        self._added.update(added)
        return marked, any(sentence.since is None for sentence in self._after.values())

    def _take_off(self, sentences: Sentences, done: Sequence[str]) -> None:
        for key in done:
            if self._is_mine(sentences.get(key)):
                del sentences[key]
        for key in self._before.keys() & sentences.keys() - self._unnamed.keys():
            if not sentences[key].deleting or self._is_left(sentences[key]):
                del sentences[key]

    def _fate(self, key: str, sentence: Sentence | None) -> str:
        if sentence is None:
            # On the list before, and not now: a writer has taken it off.
            return "waiting" if key in self._before or key in self._added else "condemned"
        if sentence.deleting:
            is_due = self._is_mine(sentence) or self._is_left(sentence)
        else:
            is_due = sentence.confirmed and _is_before(sentence, self._now - self._grace_s / 2)
        return "deleted" if is_due else "waiting"

    def _is_ripe(self, sentence: Sentence) -> bool:
        fresh = not sentence.confirmed and not sentence.deleting
        return fresh and _is_before(sentence, self._now - self._grace_s / 2 - _MARGIN_S)

    def _is_mine(self, sentence: Sentence | None) -> bool:
        return sentence is not None and sentence.deleting and sentence.by == self._name

    def _is_left(self, sentence: Sentence) -> bool:
        """Whether whoever marked it is dead."""
        return sentence.deleting and _is_before(sentence, self._now - _TAKE_OVER_S)

    def _delete(self, marked: Sequence[str]) -> list[str]:
        """Delete what was marked, as far as there is time; what was deleted."""
        done: list[str] = []
        for start in range(0, len(marked), _DELETED_AT_ONCE):
            if self._objects.now() > self._marked_at + _DELETE_WITHIN_S:
                _log.warning("%d payloads must be marked anew: deleting took too long", len(marked) - len(done))
                break
            part = marked[start : start + _DELETED_AT_ONCE]
            self._objects.delete(part)
            done += part
        return done

    def _report(self, unfinished: int) -> CollectionReport:
        garbage = [_garbage(found, self._fate_of(found.key)) for found in self._unnamed.values()]
        garbage += [_garbage(found, "expired") for found in self._expired]
        counts = {"later": self._later} if self._later[0] else {}
        for found in garbage:
            number, size = counts.get(found.fate, (0, 0))
            counts[found.fate] = number + 1, size + found.bytes
        return CollectionReport(
            dry_run=self._dry_run,
            payloads=self._payloads,
            payload_bytes=self._bytes,
            young=self._young,
            in_use=self._in_use,
            garbage=heapq.nlargest(_SHOWN, garbage, key=lambda found: found.bytes),
            counts=counts,
            pardoned=len(self._before.keys() - self._unnamed.keys()),
            unfinished=unfinished,
            foreign=self._foreign,
        )

    def _fate_of(self, key: str) -> str:
        if self._dry_run:
            return self._fate(key, self._before.get(key))
        if key in self._deleted:
            return "deleted"
        if key in self._before:
            return "waiting"
        return "condemned" if key in self._after or key in self._added else "later"


def _is_before(sentence: Sentence, moment: float) -> bool:
    return sentence.since is not None and sentence.since <= moment


def _garbage(found: ObjectInfo, fate: str) -> Garbage:
    return Garbage(found.key, found.bytes, datetime.fromtimestamp(found.modified, timezone.utc), fate)


def _chunks(found: Iterable[ObjectInfo], size: int) -> Iterator[list[ObjectInfo]]:
    rest = iter(found)
    while chunk := list(islice(rest, size)):
        yield chunk
