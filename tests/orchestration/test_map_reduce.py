"""A map-reduce as asset and op: what it stores, what it shows, what it goes on with, and how it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pyarrow as pa
import pytest

import djp_dagster as djp
from djp_dagster.errors import BadRecordsError, InvalidSettingError
from djp_dagster.mapreduce.job import MapReduce
from djp_dagster.orchestration import map_reduce as orchestration
from tests.mapreduce.kit import once, until

REPOSITORY = Path(__file__).resolve().parents[2]
DAYS = dg.DailyPartitionsDefinition("2026-11-01", end_date="2026-11-04")


@pytest.fixture
def instance(lasting: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dg.DagsterInstance:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    return lasting


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "access.log"
    path.write_text("".join(f"/page-{number % 5} {number}\n" for number in range(100)))
    return path


def page(line: str, task: djp.MapTask) -> Iterator[tuple[str, int]]:
    """Views of each page."""
    task.count("lines")
    yield line.split(maxsplit=1)[0], 1


def materialize(instance: dg.DagsterInstance, *assets: Any, **more: Any) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        assets,
        instance=instance,
        resources={"io_manager": djp.ClaimCheckIOManager(), **more.pop("resources", {})},
        **more,
    )


def shown(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node(asset)
    return {name: value.value for name, value in event.metadata.items()}


def test_an_asset_and_what_it_shows(instance: dg.DagsterInstance, log: Path) -> None:
    page_views = djp.map_reduce_asset(
        source=djp.TextFiles(log, split_bytes=200),
        combine=djp.Sum(),
        columns=("page", "views"),
        asset={"group_name": "logs", "owners": ["team:web"]},
    )(page)

    @dg.asset
    def best(page: pd.DataFrame) -> str:
        return str(page.sort_values("page")["page"].iloc[0])

    result = materialize(instance, page_views, best)
    assert result.output_for_node("best") == "/page-0"
    assert result.output_for_node("page").to_dict("list") == {
        "page": [f"/page-{number}" for number in range(5)],
        "views": [20] * 5,
    }
    found = shown(result, "page")
    assert (found["records"], found["results"], found["map_tasks"], found["bad_records"]) == (100, 5, 6, 0)
    assert found["engine"].startswith("inline x 1: ")
    assert found["top"].records[0].data == {"key": "/page-0", "value": 20}
    assert found["counters"].records[0].data == {"counter": "lines", "count": 100}
    assert found["sources"].records[0].data == {"source": str(log), "splits": 6}
    assert found["dagster/row_count"] == 5
    spec = page_views.get_asset_spec(dg.AssetKey("page"))
    assert (spec.description, spec.group_name, spec.kinds) == ("Views of each page.", "logs", {"mapreduce"})
    assert spec.code_version == MapReduce(page, combine=djp.Sum()).code_version


def test_larger_than_memory(instance: dg.DagsterInstance, log: Path) -> None:
    """A reader of Arrow batches goes through the IO manager; nothing is left of the job afterwards."""
    views = djp.map_reduce_asset(source=djp.TextFiles(log), combine=djp.Sum(), output="arrow", key="views")(page)

    @dg.asset
    def total(views: pa.Table) -> int:
        return int(sum(views["value"].to_pylist()))

    assert materialize(instance, views, total).output_for_node("total") == 100


def test_bad_records_and_too_many(instance: dg.DagsterInstance, log: Path) -> None:
    log.write_text(log.read_text() + "\n")
    options: dict[str, Any] = {"source": djp.TextFiles(log), "combine": djp.Sum()}
    found = shown(materialize(instance, djp.map_reduce_asset(**options, max_bad_fraction=0.02)(page)), "page")
    assert found["bad_records"] == 1
    assert found["bad"].records[0].data["reason"] == "IndexError: list index out of range"
    with pytest.raises(BadRecordsError, match="IndexError"):
        materialize(instance, djp.map_reduce_asset(**options)(page))


class TestPartitions:
    @pytest.fixture
    def logs(self, tmp_path: Path) -> Path:
        for number, day in enumerate(DAYS.get_partition_keys()):
            (tmp_path / f"{day}.log").write_text("".join(f"/page-{n % 3} {n}\n" for n in range(10 * (number + 1))))
        return tmp_path

    @staticmethod
    def seconds(line: str) -> Iterator[tuple[str, float]]:
        name, seconds = line.split()
        yield name, float(seconds)

    def test_partial_results_are_merged_without_their_input(self, instance: dg.DagsterInstance, logs: Path) -> None:
        daily = djp.map_reduce_asset(
            source=lambda day: djp.TextFiles(logs / f"{day}.log"),
            combine=djp.Mean(),
            output="accumulators",
            key="daily",
            asset={"partitions_def": DAYS},
        )(self.seconds)
        merged = djp.build_merged_asset(daily, key="seconds", combine=djp.Mean(), columns=("page", "seconds"))

        def expected(days: int) -> dict[str, float]:
            numbers = [(f"/page-{n % 3}", n) for number in range(days) for n in range(10 * (number + 1))]
            return {
                name: sum(n for one, n in numbers if one == name) / sum(one == name for one, _ in numbers)
                for name in sorted({one for one, _ in numbers})
            }

        keys = DAYS.get_partition_keys()
        for days, key in enumerate(keys, 1):
            assert materialize(instance, daily, partition_key=key).success
            (logs / f"{key}.log").unlink()
            result = materialize(instance, daily, merged, selection=["seconds"])
            table = result.output_for_node("seconds")
            assert dict(zip(table["page"], table["seconds"], strict=True)) == expected(days)
            assert shown(result, "seconds")["partitions"] == days

    def test_a_source_that_needs_a_partition(self, instance: dg.DagsterInstance, logs: Path) -> None:
        asset = djp.map_reduce_asset(source=lambda day: djp.TextFiles(logs / day), combine=djp.Sum())(page)
        with pytest.raises(InvalidSettingError, match="give the asset a partitions_def"):
            materialize(instance, asset)

    def test_what_cannot_be_merged(self, log: Path) -> None:
        with pytest.raises(InvalidSettingError, match="give a combine="):
            djp.map_reduce_asset(source=djp.TextFiles(log), reduce=max, output="accumulators")(page)
        with pytest.raises(InvalidSettingError, match="output='csv' must be"):
            djp.map_reduce_asset(source=djp.TextFiles(log), combine=djp.Sum(), output="csv")(page)  # type: ignore[arg-type]


def test_an_op(instance: dg.DagsterInstance, log: Path) -> None:
    job = djp.MapReduce(page, combine=djp.Sum(), name="count_pages")
    count = djp.map_reduce_op(job, source=djp.TextFiles(log), columns=("page", "views"))

    @dg.job(resource_defs={"io_manager": dg.mem_io_manager})
    def logs() -> None:
        count()

    result = logs.execute_in_process(instance=instance)
    assert result.output_for_node("count_pages")["views"].tolist() == [20] * 5


@pytest.mark.parametrize("engine", ["inline", lambda: djp.Processes(2)], ids=["inline", "processes"])
def test_over_the_stream(instance: dg.DagsterInstance, tmp_path: Path, engine: Any) -> None:
    """The resource's stream, also in other processes; heavy data of events is found there, too."""
    sales = djp.Topic("sales", partitions=2, key="product", offload_above="1kB")
    stream = djp.SqlEventStream(url=f"sqlite:///{tmp_path}/stream.db")
    stream.open().create_topic(sales)
    events = [sales.event(product=f"p{n % 3}", amount=n, note="x" * (2000 if n % 10 == 0 else 1)) for n in range(60)]
    stream.open().publish(sales, events)

    def amount(record: djp.Record) -> Iterator[tuple[str, int]]:
        yield record.data["product"], record.data["amount"] + len(record.data["note"])

    asset = djp.map_reduce_asset(source=djp.TopicRange(sales), combine=djp.Sum(), engine=engine, key="by_product")(
        amount
    )
    result = materialize(instance, asset, resources={"event_stream": stream})
    table = result.output_for_node("by_product")
    assert dict(zip(table["key"], table["value"], strict=True)) == {
        f"p{rest}": sum(n + (2000 if n % 10 == 0 else 1) for n in range(rest, 60, 3)) for rest in range(3)
    }


def test_a_run_that_failed_is_gone_on_with(
    instance: dg.DagsterInstance, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("djp_dagster.mapreduce.running._SMALL_BYTES", 0)

    def mapper(block: bytes) -> Any:
        (tmp_path / f"mapped-{time.monotonic_ns()}").touch()
        if b" 99\n" in block and (once(tmp_path, "first") or once(tmp_path, "second")):
            raise LookupError("not yet")
        return {"lines": block.count(b"\n")}

    asset = djp.map_reduce_asset(
        source=djp.TextFiles(log, split_bytes=200), combine=djp.Sum(), batch=True, engine="inline", key="lines"
    )(mapper)
    assert not materialize(instance, asset, raise_on_error=False).success
    before = len(list(tmp_path.glob("mapped-*")))
    result = materialize(instance, asset)
    assert result.output_for_node("lines")["value"].tolist() == [100]
    assert shown(result, "lines")["resumed"] == 5
    assert len(list(tmp_path.glob("mapped-*"))) == before + 1


def test_progress_is_told_now_and_then(
    instance: dg.DagsterInstance, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asset = djp.map_reduce_asset(source=djp.TextFiles(log, split_bytes=200), combine=djp.Sum())(page)
    materialize(instance, asset)
    assert "tasks," not in capfd.readouterr().err
    monkeypatch.setattr(orchestration, "_TELL_EVERY_S", 0.0)
    materialize(instance, asset)
    assert "map: 6 of 6 tasks, 100 records" in capfd.readouterr().err


STOPPED = """
import os, sys, time
from pathlib import Path
import dagster as dg
import djp_dagster as djp

def mapper(line):
    Path(sys_folder, f"worker-{os.getpid()}").touch()
    time.sleep(600)

sys_folder, log = sys.argv[1:]
asset = djp.map_reduce_asset(
    source=djp.TextFiles(log, split_bytes=200), combine=djp.Sum(), engine=lambda: djp.Processes(2), key="slow"
)(mapper)
with dg.DagsterInstance.get() as instance:
    dg.materialize([asset], instance=instance, resources={"io_manager": djp.ClaimCheckIOManager()})
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_step_that_is_stopped_leaves_nobody(
    instance: dg.DagsterInstance, log: Path, tmp_path: Path, how: signal.Signals
) -> None:
    environment = {**os.environ, "DAGSTER_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path), str(log)],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: len(list(tmp_path.glob("worker-*"))) == 2)
        workers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]
        process.send_signal(how)
        assert process.wait(30) != 0
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), within_s=10)
    finally:
        process.kill()
