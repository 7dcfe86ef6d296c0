"""Whether a store's conditional writes are atomic: found out by racing, since no server says so."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

from djp_dagster.claim_check.objects import DocumentChanged, ObjectStore
from djp_dagster.errors import CollectionRefusedError, PayloadStoreRefusedError, PayloadStoreUnavailableError

RACE = "gc/race-"
"""How the documents of races begin; what a crash leaves of them is removed by collection."""
_RACERS = 8
_proven: weakref.WeakSet[ObjectStore] = weakref.WeakSet()
"""Raced before in this process. Some servers keep the losers of a race waiting for seconds."""


def require_atomic(objects: ObjectStore) -> None:
    """Make sure, once for each open store, that of several writers of one document, new or known, exactly one succeeds.

    Raises:
        CollectionRefusedError: they are not atomic here, or not conditional at all.
        PayloadStoreUnavailableError: nobody knows; ask again.
    """
    if objects in _proven:
        return
    key = f"{RACE}{uuid4().hex}"
    try:
        first = _winner(objects, "new document", lambda body: objects.write_document(key, body, expected=None))
        document = objects.read_document(key)
        if document is None or document.body != first:
            raise _not_atomic(objects, "what the winner wrote is not what is read")
        _winner(objects, "known version", lambda body: objects.write_document(key, body, expected=document.version))
    except PayloadStoreRefusedError as error:
        raise _not_atomic(objects, f"it refuses them ({error})") from error
    finally:
        objects.delete([key])
    _proven.add(objects)


def _winner(objects: ObjectStore, what: str, write: Callable[[bytes], object]) -> bytes:
    """What the only one who succeeded has written."""
    start = threading.Barrier(_RACERS)

    def attempt(number: int) -> bytes | None:
        body = f"{what}, {number}".encode()
        start.wait()
        try:
            write(body)
        except DocumentChanged:
            return None
        return body

    with ThreadPoolExecutor(_RACERS, thread_name_prefix="djp-race") as pool:
        written = [body for body in pool.map(attempt, range(_RACERS)) if body is not None]
    if not written:
        raise PayloadStoreUnavailableError(
            f"{objects.uri}: of {_RACERS} writers of one {what} none was told that it succeeded; run it again",
            uri=objects.uri,
        )
    if len(written) != 1:
        raise _not_atomic(objects, f"of {_RACERS} writers of one {what} {len(written)} succeeded")
    return written[0]


def _not_atomic(objects: ObjectStore, why: str) -> CollectionRefusedError:
    return CollectionRefusedError(
        f"{objects.uri} has no atomic conditional writes: {why}; collect garbage of this store with its own means, or "
        "use a server that has them (AWS S3, SeaweedFS, MinIO, R2)",
        uri=objects.uri,
    )
