"""What the tests of the IO manager share: stores, runs, what a run showed, and jobs in other processes."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from dagster_aws.s3 import S3Resource

import djp_dagster as djp
from tests.servers.s3_server import REGION, S3Server

REPOSITORY = Path(__file__).resolve().parents[3]
TABLE = pa.table({"n": list(range(1000)), "s": ["x"] * 1000})
DAYS = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-01-05")
ALL_DAYS = ["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04"]


def s3_resource(server: S3Server) -> S3Resource:
    return S3Resource(
        endpoint_url=server.endpoint_url,
        region_name=REGION,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )


def s3_store(server: S3Server, bucket: str) -> djp.S3PayloadStore:
    return djp.S3PayloadStore(bucket=bucket, prefix="shop", s3=s3_resource(server), addressing="path")


class Runner:
    """Materializes some assets as a run of their own."""

    def __init__(self, instance: dg.DagsterInstance, manager: djp.ClaimCheckIOManager) -> None:
        self.instance, self.manager = instance, manager

    def __call__(
        self,
        assets: Sequence[Any],
        *names: str,
        partition: str | None = None,
        between: tuple[str, str] | None = None,
        fails: bool = False,
        **resources: Any,
    ) -> dg.ExecuteInProcessResult:
        range_tags = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
        result = dg.materialize(
            assets,
            selection=list(names) or None,
            instance=self.instance,
            resources={"io_manager": self.manager, **resources},
            partition_key=partition,
            tags=dict(zip(range_tags, between, strict=True)) if between else None,
            raise_on_error=False,
        )
        assert result.success == (not fails)
        return result


def error_of(result: dg.ExecuteInProcessResult) -> str:
    """Why the run failed, in the words of the innermost error."""
    failure = next(event for event in result.all_events if event.event_type_value == "STEP_FAILURE")
    error = failure.step_failure_data.error
    assert error is not None
    while error.cause is not None and "djp_dagster" not in error.message:
        error = error.cause
    return error.message


def metadata_of(result: dg.ExecuteInProcessResult, name: str) -> Mapping[str | None, Mapping[str, Any]]:
    """What the materializations of an asset show, by partition."""
    return {
        event.partition: {key: value.value for key, value in event.materialization.metadata.items()}
        for event in result.get_asset_materialization_events()
        if event.asset_key == dg.AssetKey([name])
    }


def stale_status(assets: Sequence[Any], instance: dg.DagsterInstance, name: str, partition: str | None = None) -> str:
    """What the UI says of an asset."""
    graph = dg.Definitions(assets=assets).get_repository_def().asset_graph
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    return str(resolver.get_status(dg.AssetKey(name), partition).value)


@contextmanager
def lasting_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """An instance with files; what `jobs.py` writes lies in this test's folder, in every process."""
    home = tmp_path / "home"
    home.mkdir()
    for name, value in (("DAGSTER_HOME", home), ("JOBS_FOLDER", tmp_path), ("JOBS_PAYLOADS", tmp_path / "payloads")):
        monkeypatch.setenv(name, str(value))
    with dg.DagsterInstance.get() as instance:
        yield instance


def start_job(name: str) -> "subprocess.Popen[bytes]":
    """A job of `jobs.py` in a process of its own."""
    code = (
        "import dagster as dg\n"
        "from tests.orchestration.claim_check import jobs\n"
        "with dg.DagsterInstance.get() as instance:\n"
        f"    assert jobs.{name}().execute_in_process(instance=instance).success\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=dict(os.environ))
