"""`Condemned`: the list of objects that garbage collection will delete, and how a writer saves one from it.

The list is one document of the store, changed by compare and set. A key on it is *condemned* since a time, or is being
*deleted*. A writer about to rely on an object that is there already asks `save` first; the protocol is in
`djp_dagster.claim_check.collection`.
"""

import threading
import time
from collections.abc import Callable

import msgspec

from djp_dagster.claim_check.objects import DocumentChanged, ObjectStore

DOCUMENT = "gc/condemned"
KNOWN_FOR_S = 60.0
"""How long a writer goes by what it read of the list; the grace period of a collection must be well above it."""
_ATTEMPTS = 20


class Sentence(msgspec.Struct, frozen=True, array_like=True):
    """Since when a key is condemned, or being deleted, in seconds since 1970 by the store's clock."""

    since: float
    deleting: bool = False


Sentences = dict[str, Sentence]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Sentences).decode


class Condemned:
    """The list, as one process knows it."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._known: Sentences = {}
        self._known_until = 0.0
        self._lock = threading.Lock()

    def read(self) -> Sentences:
        """The list as it is now."""
        document = self._objects.read_document(DOCUMENT)
        return _decode(document.body) if document is not None else {}

    def change(self, edit: Callable[[Sentences], bool]) -> Sentences:
        """Edit the list in one step, again if somebody else was quicker; the list as it is then.

        Args:
            edit: changes what it is given; False if nothing is to be changed.
        """
        for _ in range(_ATTEMPTS):
            document = self._objects.read_document(DOCUMENT)
            sentences: Sentences = _decode(document.body) if document is not None else {}
            if not edit(sentences):
                return sentences
            try:
                self._objects.write_document(
                    DOCUMENT, _encode(sentences), expected=document.version if document is not None else None
                )
            except DocumentChanged:
                continue
            return sentences
        raise DocumentChanged(DOCUMENT)

    def save(self, key: str) -> bool:
        """Take the key off the list, if it is on it. False: it is too late, use another key."""
        with self._lock:
            if time.monotonic() >= self._known_until:
                started = time.monotonic()
                self._known, self._known_until = self.read(), started + KNOWN_FOR_S
            if key not in self._known:
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
                self._known.pop(key, None)
        return saved
