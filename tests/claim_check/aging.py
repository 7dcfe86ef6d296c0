"""Making what lies in a store older, instead of waiting."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from djp_dagster import PayloadStore
from djp_dagster.claim_check.condemned import DOCUMENT, Condemned, Sentences
from djp_dagster.claim_check.local import LocalObjects
from djp_dagster.claim_check.s3 import S3Objects

DAY = 86_400.0
A_DAY_AND_MORE = DAY + 60
"""What is a day old by a clock of whole seconds, too."""


class Passing:
    """Time that passes: files and the list of the condemned become older, or the server's clock goes ahead."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self._real = patch, S3Objects.now
        self._ahead_s = 0.0

    def __call__(self, store: PayloadStore, seconds: float = A_DAY_AND_MORE) -> None:
        if isinstance(store.objects, LocalObjects):
            make_older(store.objects, seconds)
        else:
            self._ahead_s += seconds
            self._patch.setattr(S3Objects, "now", lambda objects: self._real(objects) + self._ahead_s)


def make_older(objects: LocalObjects, seconds: float) -> None:
    """Shift everything there is into the past."""
    for path in [*objects.folder.rglob("*"), *objects.spool_folder.glob(".upload-*")]:
        if path.is_file():
            found = path.stat()
            os.utime(path, (found.st_atime - seconds, found.st_mtime - seconds))

    def earlier(sentences: Sentences) -> bool:
        for key, one in sentences.items():
            sentences[key] = msgspec.structs.replace(one, since=None if one.since is None else one.since - seconds)
        return bool(sentences)

    if objects.read_document(DOCUMENT) is not None:
        Condemned(objects).change(earlier)


def tree(folder: Path) -> dict[str, tuple[bytes, float, int]]:
    """Every file below the folder: what is in it, when it was written, and its inode."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime, path.stat().st_ino)
        for path in folder.rglob("*")
        if path.is_file()
    }
