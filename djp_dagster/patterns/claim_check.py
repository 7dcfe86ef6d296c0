"""Claim check: a heavy value goes to a payload store, a small pointer says which one is current.

How a value is stored
    1. Its payload is durable in the store, or small enough to stay inline in the pointer. *A crash after it leaves a
       payload that nothing refers to: collection removes it.*
    2. The pointer of the asset, partition or op output is replaced in one step. *A crash after it: the new value is
       there, and Dagster has no materialization of it; the retry or the next run stores the same, or a newer one.*
    3. Dagster records the materialization, with the hash of the content as data version.

A reader that began before 2 reads the value it began with to its end. Of several writers of one asset or partition the
last one wins; give the asset a ``pool`` of one slot if they may not meet.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import dagster as dg
from pydantic import Field, PrivateAttr, field_validator

from djp_dagster.claim_check.claims import Claim
from djp_dagster.claim_check.loading import Held, LoadedFiles, load
from djp_dagster.claim_check.pointers import Pointer, asset_key, op_key, read_pointer, values_of, write_pointer
from djp_dagster.claim_check.serializers.kinds import Form, form_of, item_of, name_of, without_none
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.claim_check.values import MAX_INLINE_BYTES, Inline, Keeping, Kept, keep
from djp_dagster.errors import (
    InvalidSettingError,
    PayloadError,
    PayloadExpiredError,
    PayloadMissingError,
    PayloadStoreUnavailableError,
)
from djp_dagster.orchestration.values import (
    ALLOW_MISSING,
    MEDIA_TYPE,
    THRESHOLD,
    annotation_of,
    by_partition,
    metadata_of,
    partitions_of,
    reads_in_a_partition,
    step_of,
    told_by_partition,
    without,
)
from djp_dagster.resources.payload_stores import PayloadStoreResource, default_payload_store
from djp_dagster.units import Size, parse_bytes, parse_seconds

_WRITERS = _READERS = 4  # each may need some 100 MiB
_POINTER_READERS = 16
_MOST_NAMED = 5
_values_of = lru_cache(maxsize=None)(values_of)
_files = LoadedFiles()
"""What was loaded outside of runs; it goes when the process ends."""
T = TypeVar("T")
R = TypeVar("R")


class ClaimCheckIOManager(dg.ConfigurableIOManager):
    """Keeps values of assets and ops in a payload store: streamed, verified, never pickled unless asked for.

    Tables of pandas, Arrow and polars become Parquet; bytes, text, files, streams and JSON values stay what they are; a
    `Claim` of this store is kept without reading its payload. An input gets what its annotation says, whatever library
    the value came from; an input without annotation gets what was stored. The hash of the content is the asset's data
    version, so an unchanged value leaves what is downstream of it fresh.

    Metadata of an asset or output: ``djp/threshold``; ``djp/media_type`` of bytes, text, files and streams;
    ``djp/by_partition``. Of an input: ``allow_missing_partitions``, ``djp/by_partition``.

    Example:
        >>> from djp_dagster import LocalPayloadStore
        >>> manager = ClaimCheckIOManager(store=LocalPayloadStore(folder="/var/lib/shop/payloads"), threshold="1MiB")
        >>> manager.payloads().uri
        'file:///var/lib/shop/payloads/assets'
    """

    store: PayloadStoreResource | None = Field(
        default=None, description="Where payloads lie; else in bucket $DJP_S3_BUCKET, or a folder under DAGSTER_HOME."
    )
    threshold: str = Field(
        default="256KiB", description="Serialized values up to this size stay inline in their pointers; at most 4MiB."
    )
    allow_pickle: bool = Field(
        default=False,
        description="Pickle what is neither a table, bytes, text, a file nor JSON, and read such values. Whoever can "
        "write to the store can then run code where they are read.",
    )
    op_outputs_expire_in: str | None = Field(
        default="30d", description="How long outputs of ops are kept, for re-executions and retries; None: for ever."
    )
    _loaded: LoadedFiles = PrivateAttr(default_factory=LoadedFiles)

    @field_validator("threshold", "op_outputs_expire_in", mode="before")
    @classmethod
    def _checked(cls, value: Any, info: Any) -> Any:
        if value is None or isinstance(value, dg.EnvVar):
            return value
        if info.field_name == "threshold":
            _threshold(value)
        else:
            parse_seconds(value, name="op_outputs_expire_in")
        return str(value)

    def payloads(self) -> PayloadStore:
        """The store of the values, for assets that put payloads there themselves and return the claim.

        Raises:
            InvalidSettingError: naming the setting.
        """
        return _values_of(self.store.open() if self.store is not None else default_payload_store())

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Remove the files that inputs were given."""
        self._loaded.close()

    # Storing

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Store a value, and make it the current one.

        Raises:
            InvalidSettingError: the value is of no type that can be stored, or not by partition.
            PayloadStoreUnavailableError, PayloadStoreRefusedError: what was not replaced is still the current one.
        """
        how, write = self._keeping(context), self._writer(context)
        keys = partitions_of(context)
        if keys is None:
            if context.has_asset_key:
                kept = write(asset_key(context.asset_key.path), obj, how)
                _set_data_version(context, kept.content_hash)
            else:
                kept = write(op_key(context.get_identifier()), obj, how)
            context.add_output_metadata(without(metadata_of(kept), context.output_metadata))
            return
        path, values = context.asset_key.path, by_partition(context, obj, keys)
        stored = _at_once(_WRITERS, lambda key: write(asset_key(path, key), values[key], how), list(values))
        _tell_of_partitions(context, dict(zip(values, stored, strict=True)))

    def _keeping(self, context: dg.OutputContext) -> Keeping:
        told = context.definition_metadata
        return Keeping(
            store=self.payloads(),
            threshold=_threshold(told.get(THRESHOLD, self.threshold)),
            expires_in=None if context.has_asset_key else self.op_outputs_expire_in,
            media_type=told.get(MEDIA_TYPE),
            allow_pickle=self.allow_pickle,
            declared=annotation_of(context),
        )

    def _writer(self, context: dg.OutputContext) -> Callable[[str, Any, Keeping], Kept]:
        step = step_of(context)
        run_id = step.run_id if step is not None else ""

        def write(key: str, value: Any, how: Keeping) -> Kept:
            kept = keep(value, how)
            now = time.time()
            expires_in = None if how.expires_in is None else parse_seconds(how.expires_in)
            pointer = Pointer(
                kind=kept.kind,
                run_id=run_id,
                stored_at=round(now, 3),
                claim=kept.payload if isinstance(kept.payload, Claim) else None,
                inline=kept.payload if isinstance(kept.payload, Inline) else None,
                expires_at=None if expires_in is None else round(now + expires_in),
            )
            write_pointer(how.store, key, pointer)
            return kept

        return write

    # Loading

    def load_input(self, context: dg.InputContext) -> Any:
        """The current value, or those of several partitions by their keys, in the form the input is annotated with.

        Raises:
            PayloadMissingError: naming the asset and the partitions that were never stored.
            PayloadExpiredError: the time of an op's output is up.
            InvalidSettingError: what was stored cannot be had in that form.
            PayloadForbiddenError: it is a pickle, and that is not wanted.
            PayloadCorruptError, PayloadStoreUnavailableError: as `PayloadStore.open`.
        """
        keys = partitions_of(context)
        if keys is not None:
            return self._load_partitions(context, keys)
        if context.has_asset_key:
            name, key = f"asset {context.asset_key.to_user_string()!r}", asset_key(context.asset_key.path)
        else:
            assert context.upstream_output is not None
            identifier = context.upstream_output.get_identifier()
            name, key = f"output {identifier[2]!r} of step {identifier[1]!r}", op_key(identifier)
        pointer = self._pointer(key, name)
        if pointer is None:
            raise _missing(name, self.payloads())
        return self._value(pointer, form_of(annotation_of(context)), name, self._files(context))

    def _load_partitions(self, context: dg.InputContext, keys: Sequence[str]) -> Any:
        annotation, files = annotation_of(context), self._files(context)
        form, item = form_of(annotation), item_of(annotation)
        asset, path = f"asset {context.asset_key.to_user_string()!r}", context.asset_key.path
        if len(keys) != 1 and item is None and not (form.name == "as_stored" or (form.nullable and not keys)):
            raise InvalidSettingError(
                f"an input annotated {name_of(annotation)} covers {len(keys)} partitions of {asset}; annotate it "
                f"dict[str, {name_of(without_none(annotation)[0])}]{'' if keys else ', or Optional'}",
                setting="annotation",
                value=name_of(annotation),
            )
        names = {key: f"{asset}, partition {str(key)!r}" for key in keys}
        read = _at_once(_POINTER_READERS, lambda key: self._pointer(asset_key(path, key), names[key]), keys)
        pointers = {key: pointer for key, pointer in zip(keys, read, strict=True) if pointer is not None}
        missing = [key for key in keys if key not in pointers]
        if missing and not context.definition_metadata.get(ALLOW_MISSING):
            raise _missing(f"{asset}, {_partitions(missing)}", self.payloads())
        if (not keys and item is None) or (len(keys) == 1 and not self._is_by_partition(context, pointers, item)):
            return next((self._value(pointers[key], form, names[key], files) for key in pointers), None)
        each = form if item is None else form_of(item)
        values = _at_once(_READERS, lambda key: self._value(pointers[key], each, names[key], files), list(pointers))
        return dict(zip(pointers, values, strict=True))

    def _is_by_partition(self, context: dg.InputContext, pointers: Mapping[str, Pointer], item: Any) -> bool:
        """Whether an input that covers one partition wants a dict with its value, or the value, which may be a dict."""
        told = told_by_partition(context)
        if told is not None or item is None:
            return bool(told)
        if not reads_in_a_partition(context):
            return True
        plain = Form("as_stored")
        return not any(
            one.kind in ("json", "pickle") and isinstance(self._value(one, plain, "", _files), dict)
            for one in pointers.values()
        )

    def _files(self, context: dg.InputContext) -> LoadedFiles:
        return self._loaded if step_of(context) is not None else _files

    def _pointer(self, key: str, name: str) -> Pointer | None:
        with _naming(name):
            return read_pointer(self.payloads(), key)

    def _value(self, pointer: Pointer, form: Form, name: str, files: LoadedFiles) -> Any:
        with _naming(name):
            if pointer.has_expired:
                raise PayloadExpiredError(
                    f"it was kept for op_outputs_expire_in={self.op_outputs_expire_in!r} after it was stored; run the "
                    "step again, or keep outputs of ops for longer"
                )
            held = Held(self.payloads(), pointer.kind, pointer.payload)
            return load(held, form, files, allow_pickle=self.allow_pickle)


def _threshold(value: Size) -> int:
    threshold = parse_bytes(value, name="threshold")
    if threshold > MAX_INLINE_BYTES:
        raise InvalidSettingError(
            f"threshold={value!r} must be at most 4MiB: pointers are small documents", setting="threshold", value=value
        )
    return threshold


def _set_data_version(context: dg.OutputContext, content_hash: str) -> None:
    step = step_of(context)
    # What the asset itself has set wins.
    if step is not None and not step.has_data_version(context.asset_key):
        step.set_data_version(context.asset_key, dg.DataVersion(f"sha256:{content_hash}"))


def _tell_of_partitions(context: dg.OutputContext, stored: Mapping[str, Kept]) -> None:
    if len(stored) == 1:
        (kept,) = stored.values()
        _set_data_version(context, kept.content_hash)
        context.add_output_metadata(without(metadata_of(kept), context.output_metadata))
        return
    # A step has one data version, whichever and however many partitions it covers.
    told = "".join(f"{key}={stored[key].content_hash}\n" for key in sorted(stored))
    _set_data_version(context, hashlib.sha256(told.encode(errors="surrogatepass")).hexdigest())
    step = step_of(context)
    if step is not None:
        for key, kept in stored.items():
            shown = without(metadata_of(kept), context.output_metadata)
            step.add_asset_metadata(shown, asset_key=context.asset_key, partition_key=key)


def _at_once(threads: int, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What the work makes of each; with the first that fails, the rest is not begun."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items)), thread_name_prefix="djp-partitions") as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _partitions(keys: Sequence[str]) -> str:
    shown = ", ".join(repr(str(key)) for key in keys[:_MOST_NAMED])
    more = f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else ""
    return f"partition{'s' if len(keys) > 1 else ''} {shown}{more}"


def _missing(name: str, store: PayloadStore) -> PayloadMissingError:
    hint = f'; or allow it: AssetIn(metadata={{"{ALLOW_MISSING}": True}})' if ", partition" in name else ""
    return PayloadMissingError(
        f"{name} has no value in {store.uri}: materialize it with this IO manager first{hint}", name=name
    )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What cannot be read, in the words of whoever wants it."""
    try:
        yield
    except (PayloadError, PayloadStoreUnavailableError, InvalidSettingError) as error:
        error.args = (f"{name}: {error}",)
        raise
