"""How much memory a large table takes beside itself, when it is stored and when it is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.orchestration.claim_check.kit import REPOSITORY, s3_store
from tests.servers.seaweedfs import SeaweedServer

MIB = 1 << 20
TO_STORE, TO_LOAD = 32 * MIB, 96 * MIB
"""For slices, groups of columns, parts under way from S3, and what Dagster does meanwhile."""

CODE = """
import gc, json, sys, time
from pathlib import Path

import dagster as dg, numpy as np, pandas as pd, polars, pyarrow as pa
import djp_dagster as djp
from dagster_aws.s3 import S3Resource

rows, what, settings = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
store = (
    djp.LocalPayloadStore(folder=settings["folder"])
    if "folder" in settings
    else djp.S3PayloadStore(**{**settings, "s3": S3Resource(**settings["s3"])})
)


def memory(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


def made(count):
    draw = np.random.default_rng(1)
    numbers = draw.integers(0, 10**6, count)
    return pd.DataFrame(
        {
            "id": np.arange(count),
            "user": draw.integers(0, 10**5, count),
            "amount": draw.normal(100, 20, count),
            "quantity": draw.integers(1, 9, count).astype("int32"),
            "at": pd.Timestamp("2026-01-01") + pd.to_timedelta(numbers, "s"),
            "paid": numbers % 2 == 0,
            "name": pd.Series(pd.array(np.char.add("customer-", numbers.astype(str)), "str")),
            "country": pd.Categorical.from_codes(numbers % 4, ["de", "fr", "it", "es"]),
        }
    )


held = {}


def assets(name):
    @dg.asset(name=name)
    def stored():
        return held["frame"]

    @dg.asset(name=name + "_reader", ins={"table": dg.AssetIn(name)})
    def reader(table: pd.DataFrame) -> None:
        gc.collect()
        held["rows"], held["after"] = len(table), memory("VmRSS")

    return [stored, reader]


def run(name):
    pa.default_memory_pool().release_unused()
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.monotonic()
    io = djp.ClaimCheckIOManager(store=store)
    assert dg.materialize(assets(name.removesuffix("_reader")), selection=[name], resources={"io_manager": io}).success
    seconds = time.monotonic() - started
    return before, memory("VmHWM") - before, seconds


held["frame"] = made(1000)
run("small")
run("small_reader")
if what == "store":
    empty = memory("VmRSS")
    held["frame"] = made(rows)
    gc.collect()
    before, peak, seconds = run("orders")
    print(json.dumps({"table": before - empty, "peak": peak, "seconds": seconds}))
else:
    before, peak, seconds = run("orders_reader")
    assert held["rows"] == rows
    print(json.dumps({"table": held["after"] - before, "peak": peak, "seconds": seconds}))
"""


def measured(rows: int, what: str, settings: dict[str, Any]) -> dict[str, float]:
    """Bytes of the table in memory, and by how much memory rose at most, while a step stored or loaded it."""
    command = [sys.executable, "-c", CODE, str(rows), what, json.dumps(settings)]
    # glibc keeps an arena for each thread, which says nothing about this package.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(rows, what, {name: round(value / MIB, 1) if value > MIB else value for name, value in found.items()})
    return found


def check(rows: int, settings: dict[str, Any]) -> None:
    stored = measured(rows, "store", settings)
    assert stored["peak"] <= stored["table"] / 3 + TO_STORE
    loaded = measured(rows, "load", settings)
    assert loaded["peak"] <= loaded["table"] * 4 / 3 + TO_LOAD


def settings_of(server: SeaweedServer, bucket: str) -> dict[str, Any]:
    store = s3_store(server, bucket)
    assert store.s3 is not None
    kept = ("endpoint_url", "region_name", "aws_access_key_id", "aws_secret_access_key")
    s3 = {name: getattr(store.s3, name) for name in kept}
    return {"bucket": bucket, "prefix": "shop", "addressing": "path", "s3": s3}


def test_a_table_in_a_folder(tmp_path: Path) -> None:
    check(2_000_000, {"folder": str(tmp_path)})


@pytest.mark.soak
@pytest.mark.servers
def test_a_table_on_s3(s3_server: SeaweedServer, s3_bucket: str) -> None:
    check(5_000_000, settings_of(s3_server, s3_bucket))
