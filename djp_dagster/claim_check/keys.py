"""The keys of a payload store, below its URI.

======================================  ==============================================================================
``sha256/ab/cdef...[.zst]``             content-addressed payloads, written once, shared by whoever stores the same
``expiring/2026-11-29/sha256/...``      the same for payloads that may go from that day on
``attempts/...``                        what one attempt at a batch wrote, under a path of its own
``pointers/...``                        documents that say which payload is the current one of an asset or partition
``rooms/<name>``                        who keeps references to payloads of this store; garbage collection asks them all
``gc/...``                              the state of garbage collection
======================================  ==============================================================================
"""

import os
from datetime import datetime, timedelta, timezone

from djp_dagster.claim_check.claims import ZSTD

_ZSTD_SUFFIX = ".zst"
_HASH_DIGITS = 64


def content_key(sha256: str, encoding: str | None, expires: datetime | None) -> str:
    """Where the payload of a hash lies: by how it is stored, and by the day from which on it may go."""
    suffix = _ZSTD_SUFFIX if encoding == ZSTD else ""
    when = "" if expires is None else f"expiring/{expires:%Y-%m-%d}/"
    return f"{when}sha256/{sha256[:2]}/{sha256[2:]}{suffix}"


def hash_in(key: str) -> str:
    """The hash that a content-addressed key consists of; empty if it is none."""
    head, _, name = key.rpartition("/")
    digest = head[-2:] + name.partition(".")[0]
    is_content = f"/{head}".endswith(f"/sha256/{head[-2:]}") and len(digest) == _HASH_DIGITS
    return digest if is_content else ""


def day_after(seconds: float) -> datetime:
    """The first midnight that is at least so far away: whole days, so that payloads are shared within one."""
    at = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return at.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


LONGEST_KEY = f"expiring/2000-01-01/sha256/00/{'0' * 62}.{'0' * 12}{_ZSTD_SUFFIX}"
"""No content-addressed key is longer."""


def another_key(key: str) -> str:
    """A key of its own for the content of a content-addressed key."""
    stem, dot, suffix = key.partition(".")
    return f"{stem}.{os.urandom(6).hex()}{dot}{suffix}"
