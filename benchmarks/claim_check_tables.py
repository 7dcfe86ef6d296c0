"""Five million mixed rows, stored by one asset and loaded by the next, through our I/O manager and S3PickleIOManager.

Each of the two is a run of `dagster.materialize` in a process of its own. Timed is what the I/O manager does. Memory is
what it needs beside the frame: over what the process has with the frame when it stores, beyond the frame when it loads.
"""

import ctypes
import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pyarrow as pa
from dagster_aws.s3 import S3PickleIOManager, S3Resource

from benchmarks.claim_check_process import MIB, Meter, Variants, fresh_bucket, memory, s3_client
from benchmarks.harness import Row, Settings, alternate
from djp_dagster import ClaimCheckIOManager, S3PayloadStore
from tests.servers.seaweedfs import SeaweedServer

_ROWS, _FIRST_ROWS = 5_000_000, 50_000
_ROUNDS = 3
_SPEED, _MEMORY = 2.0, 3.0
_TEXTS = {"str": "str", "object": "Python objects"}
_DID = {"store": "stored", "load": "loaded"}
_QUIET = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}


def frame_of(rows: int, text: str) -> pd.DataFrame:
    """The same for everybody; its text in the dtype that pandas gives it by default, or as Python objects."""
    chance = np.random.default_rng(4)
    letters = chance.integers(97, 123, (rows, 16), dtype=np.uint8)
    letters[np.arange(16) >= chance.integers(8, 17, (rows, 1))] = 0
    cities = np.array(["Berlin", "Frankfurt am Main", "Hamburg", "Köln", "München"], dtype=object)
    dtype = {"object": object, "str": "str"}[text]
    return pd.DataFrame(
        {
            "number": chance.integers(-(2**62), 2**62, rows),
            "price": chance.normal(100.0, 20.0, rows),
            "name": pd.Series(letters.view("S16").ravel().astype(str).astype(object), dtype=dtype),
            "city": pd.Series(cities[chance.integers(0, len(cities), rows)], dtype=dtype),
            "time": pd.Timestamp("2026-01-01") + pd.to_timedelta(chance.integers(0, 10**15, rows), unit="us"),
        }
    )


class _Metered:
    """Measures what the I/O manager does with the asset ``frame``, and nothing else."""

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        if context.asset_key != _FRAME:
            super().handle_output(context, obj)  # type: ignore[misc]
            return
        _release()
        with _meters[0]():
            super().handle_output(context, obj)  # type: ignore[misc]

    def load_input(self, context: dg.InputContext) -> Any:
        if context.asset_key != _FRAME:
            return super().load_input(context)  # type: ignore[misc]
        _release()
        before = memory("VmRSS")
        with _meters[0]():
            value = super().load_input(context)  # type: ignore[misc]
        _release()
        _kept.append(memory("VmRSS") - before)
        return value


class _Ours(_Metered, ClaimCheckIOManager):
    pass


class _Peer(_Metered, S3PickleIOManager):
    pass


_FRAME = dg.AssetKey("frame")
_meters: list[Meter] = []
_kept: list[int] = []
"""How much more memory the process has once the frame is loaded."""


def _release() -> None:
    """Give back to the system what nobody uses: it would hide what is needed next."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)


def _manager(way: str, bucket: str) -> dg.ConfigurableIOManager:
    if way == "ours":
        return _Ours(store=S3PayloadStore(bucket=bucket))
    return _Peer(s3_resource=S3Resource(), s3_bucket=bucket)


def _assets(rows: int, text: str, told: dict[str, Any]) -> list[dg.AssetsDefinition]:
    @dg.asset
    def first() -> pd.DataFrame:
        return frame_of(_FIRST_ROWS, text)

    @dg.asset
    def frame() -> pd.DataFrame:
        made = frame_of(rows, text)
        told["hash"] = _hash(made)
        return made

    @dg.asset
    def after_first(first: pd.DataFrame) -> None:
        assert _hash(first) == _hash(frame_of(_FIRST_ROWS, text))

    @dg.asset
    def after(frame: pd.DataFrame) -> None:
        told["hash"] = _hash(frame)

    return [first, frame, after_first, after]


def _hash(frame: pd.DataFrame) -> str:
    """Of all rows with their numbers. Parquet, as pandas reads it, makes text of any dtype ``str``."""
    return f"{list(frame.columns)} {int(pd.util.hash_pandas_object(frame).sum()):x}"


def store(meter: Meter, way: str, text: str, bucket: str, rows: int) -> dict[str, Any]:
    return _materialize(meter, way, text, bucket, rows, ["first"], ["frame"])


def load(meter: Meter, way: str, text: str, bucket: str, rows: int) -> dict[str, Any]:
    told = _materialize(meter, way, text, bucket, rows, ["first", "after_first"], ["after"])
    sizes = [found["Size"] for found in s3_client().list_objects_v2(Bucket=bucket)["Contents"]]
    return {**told, "kept": _kept[0], "stored": max(sizes)}


def _materialize(
    meter: Meter, way: str, text: str, bucket: str, rows: int, before: list[str], selected: list[str]
) -> dict[str, Any]:
    """Materialize what is selected, after what brings all modules into memory."""
    _meters[:] = [meter]
    told: dict[str, Any] = {}
    with dg.instance_for_test() as instance:
        for selection in (before, selected):
            dg.materialize(
                _assets(rows, text, told),
                selection=selection,
                resources={"io_manager": _manager(way, bucket)},
                instance=instance,
                run_config=_QUIET,
            )
    return told


def run(server: SeaweedServer, _folder: Path, settings: Settings, _size: int) -> list[Row]:
    """Storing and loading, with text of both kinds."""
    rows = _ROWS // settings.scale
    variants = Variants(server, min(settings.rounds, _ROUNDS))

    def both(way: str, text: str) -> float:
        with fresh_bucket(server) as bucket:
            given = {"way": way, "text": text, "bucket": bucket, "rows": rows}
            stored = variants.once(f"store {text} {way}", store, **given)
            loaded = variants.once(f"load {text} {way}", load, **given)
        assert stored.told["hash"] == loaded.told["hash"]
        return stored.seconds + loaded.seconds

    loops = {f"{way} {text}": partial(both, way, text) for text in _TEXTS for way in ("ours", "peer")}
    alternate(variants.rounds, loops)
    return [row for text in _TEXTS for row in _rows(variants, text, rows)]


def _rows(variants: Variants, text: str, rows: int) -> Iterator[Row]:
    names = [f"load {text} {way}" for way in ("ours", "peer")]
    kept = [variants.median(name, lambda one: one.told["kept"]) for name in names]
    stored = (f"{variants.found[name][0].told['stored'] / MIB:,.0f} MiB" for name in names)
    yield Row(f"{rows:,} rows, text as {_TEXTS[text]}: stored bytes / S3PickleIOManager", *stored)
    yield Row("  the frame in memory, once it is loaded", *(f"{size / MIB:,.0f} MiB" for size in kept))
    for step, did in _DID.items():
        ours, peer = f"{step} {text} ours", f"{step} {text} peer"
        ratio = variants.ratio(ours, peer)
        seconds = (f"{variants.median(name, lambda one: one.seconds):.1f} s" for name in (ours, peer))
        yield Row(f"  {did}", *seconds, f"{ratio:.2f}x", f"≥ {_SPEED:g}x", ratio >= _SPEED)
        beside = [
            max(variants.median(name, lambda one: one.risen_bytes) - (size if step == "load" else 0), MIB)
            for name, size in zip((ours, peer), kept, strict=True)
        ]
        saved = beside[1] / beside[0]
        costs = (
            f"{value / MIB:,.0f} MiB; {variants.cost(name).partition('; ')[2]}"
            for value, name in zip(beside, (ours, peer), strict=True)
        )
        yield Row(
            "    peak memory beside the frame; processor + server",
            *costs,
            f"1 / {saved:.1f}",
            f"≤ 1 / {_MEMORY:g}",
            saved >= _MEMORY,
        )
