"""`Condemned`: the list of objects that garbage collection will delete, and how a writer saves one from it.

The list is one document of the store, changed by compare and set. A key on it is *condemned*, then *confirmed*, then
being *deleted*. A writer about to rely on an object that is there already asks `save` first; the protocol is in
`djp_dagster.claim_check.collection`.
"""

import random
import threading
import time
import zlib
from collections.abc import Callable
from itertools import count

import msgspec

from djp_dagster.claim_check.objects import DocumentChanged, ObjectStore
from djp_dagster.errors import PayloadStoreRefusedError, PayloadStoreUnavailableError

DOCUMENT = "gc/condemned"
KNOWN_FOR_S = 60.0
"""How long a writer goes by what it read of the list; the grace period of a collection must be well above it."""
_PATIENCE_S, _ATTEMPTS = 60.0, 20
_LONGEST_PAUSE_S = 1.0


class Sentence(msgspec.Struct, frozen=True, array_like=True):
    """What is to become of a key, and since when it stands there, in seconds since 1970 by the store's clock.

    Attributes:
        since: a time at which the list was read and the key stood there like this; None until somebody has read it.
        deleting: it is being deleted: nobody may begin to rely on it.
        confirmed: another collection has found, later, that still nothing refers to it.
        by: the collection that deletes it.
    """

    since: float | None = None
    deleting: bool = False
    confirmed: bool = False
    by: str = ""


Sentences = dict[str, Sentence]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Sentences).decode


class Condemned:
    """The list, as one process knows it."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._known: set[str] = set()
        self._read_at: tuple[float, float] | None = None
        self._lock = threading.Lock()

    def read(self) -> Sentences:
        """The list as it is now."""
        return self._read()[0]

    def change(self, edit: Callable[[Sentences], bool]) -> Sentences:
        """Edit the list in one step, again if somebody else was quicker; the list as it is then.

        Args:
            edit: changes what it is given; False if nothing is to be changed. It may be called several times.

        Raises:
            PayloadStoreUnavailableError: others change it all the time.
        """
        give_up = time.monotonic() + _PATIENCE_S
        pause_s = 0.005
        for attempt in count(1):
            sentences, version = self._read()
            if not edit(sentences):
                return sentences
            try:
                self._objects.write_document(DOCUMENT, zlib.compress(_encode(sentences), 1), expected=version)
            except DocumentChanged as error:
                if attempt >= _ATTEMPTS and time.monotonic() > give_up:
                    raise PayloadStoreUnavailableError(
                        f"the list of condemned payloads in {self._objects.uri} changed whenever it was to be changed, "
                        f"for {_PATIENCE_S:.0f} s; try again with less at once",
                        uri=self._objects.uri,
                    ) from error
                time.sleep(random.uniform(0, pause_s))  # noqa: S311
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                return sentences
        raise AssertionError

    def _read(self) -> tuple[Sentences, str | None]:
        document = self._objects.read_document(DOCUMENT)
        if document is None:
            return {}, None
        try:
            return _decode(zlib.decompress(document.body)), document.version
        except (zlib.error, msgspec.DecodeError) as error:
            raise PayloadStoreRefusedError(
                f"{self._objects.uri}/{DOCUMENT} is not the list of condemned payloads, or of another release; while "
                "nobody writes to this store, remove it: collection begins anew",
                uri=self._objects.uri,
            ) from error

    def is_clear(self, key: str, *, ask: bool = True) -> bool:
        """Whether no collection can be deleting the key, nor begin to for a grace period from when the list was read.

        Args:
            key: of an object.
            ask: read the list if what is known of it is old; without it, the answer is False then.
        """
        with self._lock:
            if not self._is_fresh():
                if not ask:
                    return False
                asked_at = time.monotonic(), time.time()
                self._known, self._read_at = set(self.read()), asked_at
            return key not in self._known

    def _is_fresh(self) -> bool:
        # By two clocks: one stands still while the machine sleeps, the other may be set back.
        if self._read_at is None:
            return False
        ages = time.monotonic() - self._read_at[0], time.time() - self._read_at[1]
        return all(0 <= age < KNOWN_FOR_S for age in ages)

    def save(self, key: str) -> bool:
        """Take the key off the list, if it is on it. False: it is too late, use another key."""
        if self.is_clear(key):
            return True
        saved = True

        def pardon(sentences: Sentences) -> bool:
            nonlocal saved
            found = sentences.get(key)
            saved = found is None or not found.deleting
            return found is not None and saved and sentences.pop(key) is not None

        self.change(pardon)
        with self._lock:
            if saved:
                self._known.discard(key)
        return saved
