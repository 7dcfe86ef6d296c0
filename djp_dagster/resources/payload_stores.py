"""`LocalPayloadStore`, and what all payload stores have in common as Dagster resources."""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import dagster as dg
from pydantic import Field

from djp_dagster.claim_check.location import bucket_of_environment, open_payload_store
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.streams.location import default_folder

_opened: dict[tuple[int, str], PayloadStore] = {}
_opening = threading.Lock()


class PayloadStoreResource(dg.ConfigurableResource, ABC):  # type: ignore[type-arg]
    """Where payloads lie; `LocalPayloadStore` or `S3PayloadStore`."""

    max_payload_bytes: str = Field(default="5TiB", description="No payload may be larger, e.g. '10GiB'.")
    max_read_bytes: str = Field(
        default="256MiB", description="What is larger is not read into memory at once, but as a stream."
    )
    former_uris: list[str] = Field(
        default=[], description="URIs the store had before it moved; claims that name them are still resolved."
    )

    def open(self) -> PayloadStore:
        """The store, opened once per process: Dagster makes new resources for every run, and connections cost.

        Asks nobody.

        Raises:
            InvalidSettingError: naming the setting.
        """
        # As text, because settings are lists and mappings; it holds secrets, and stays in memory. What is not told may
        # follow from DAGSTER_HOME.
        return _once(f"{type(self).__name__}:{self.model_dump_json()}:{default_folder().absolute()}", self._open)

    @abstractmethod
    def _open(self) -> PayloadStore:
        """A new store."""

    def _limits(self) -> dict[str, Any]:
        return {
            "max_payload_bytes": self.max_payload_bytes,
            "max_read_bytes": self.max_read_bytes,
            "former_uris": tuple(self.former_uris),
        }


class LocalPayloadStore(PayloadStoreResource):
    """Payloads in a folder, on one host or on a shared file system.

    Example:
        >>> LocalPayloadStore(folder="/var/lib/shop/payloads").open().uri
        'file:///var/lib/shop/payloads'
    """

    folder: str | None = Field(
        default=None, description="Made when first needed; 'djp/payloads' under DAGSTER_HOME unless given."
    )

    def _open(self) -> PayloadStore:
        place = Path(self.folder) if self.folder is not None else default_folder() / "payloads"
        return open_payload_store(place, **self._limits())


def default_payload_store() -> PayloadStore:
    """The bucket that ``$DJP_S3_BUCKET`` names, else a folder under DAGSTER_HOME."""
    bucket = {name: value for name, value in os.environ.items() if name.startswith("DJP_S3_")}
    if bucket.get("DJP_S3_BUCKET"):
        return _once(repr(sorted(bucket.items())), lambda: cast(PayloadStore, bucket_of_environment()))
    return LocalPayloadStore().open()


def _once(key: str, make: Callable[[], PayloadStore]) -> PayloadStore:
    with _opening:
        found = _opened.get((os.getpid(), key))
        if found is None:
            found = _opened[os.getpid(), key] = make()
        return found
