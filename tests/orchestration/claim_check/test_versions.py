"""Data versions, and who reads what while an asset is materialized anew."""

import random
from typing import Any, BinaryIO

import dagster as dg
import pandas as pd
import pytest

from tests.orchestration.claim_check.kit import ALL_DAYS, DAYS, Runner, stale_status


class TestDataVersions:
    """An unchanged value leaves what is downstream of it fresh."""

    def test_of_a_value(self, run: Runner, instance: dg.DagsterInstance) -> None:
        said = {"value": 1}

        @dg.asset
        def up() -> pd.DataFrame:
            return pd.DataFrame({"a": [said["value"]] * 1000})

        @dg.asset
        def down(up: pd.DataFrame) -> int:
            return 1

        def status() -> str:
            return stale_status([up, down], instance, "down")

        run([up, down])
        run([up, down], "up")
        assert status() == "FRESH"
        said["value"] = 2
        run([up, down], "up")
        assert status() == "STALE"
        said["value"] = 1
        run([up, down], "up")
        assert status() == "FRESH"

    def test_of_partitions(self, run: Runner, instance: dg.DagsterInstance) -> None:
        said = {"value": 1}

        @dg.asset(partitions_def=DAYS)
        def up(context: dg.AssetExecutionContext) -> str:
            return f"{context.partition_key} {said['value']}"

        @dg.asset(partitions_def=DAYS)
        def down(up: str) -> int:
            return 1

        for key in ALL_DAYS[:2]:
            run([up, down], partition=key)
        said["value"] = 2
        run([up, down], "up", partition=ALL_DAYS[1])
        run([up, down], "up", partition=ALL_DAYS[1])
        assert [stale_status([up, down], instance, "down", key) for key in ALL_DAYS[:3]] == [
            "FRESH",
            "STALE",
            "MISSING",
        ]

    def test_of_a_range(self, run: Runner, instance: dg.DagsterInstance) -> None:
        said = {"2026-01-01": 1, "2026-01-02": 1}

        @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
        def up(context: dg.AssetExecutionContext) -> Any:
            return {key: said[key] for key in context.partition_keys}

        @dg.asset(partitions_def=DAYS)
        def down(up: int) -> int:
            return up

        both = ("2026-01-01", "2026-01-02")
        run([up], between=both)
        for key in both:
            run([up, down], "down", partition=key)
        run([up], between=both)
        assert [stale_status([up, down], instance, "down", key) for key in both] == ["FRESH", "FRESH"]
        said["2026-01-02"] = 2
        run([up], between=both)
        assert stale_status([up, down], instance, "down", "2026-01-02") == "STALE"

    def test_what_the_asset_says_itself_wins(self, run: Runner) -> None:
        @dg.asset
        def body(context: dg.AssetExecutionContext) -> int:
            context.set_data_version(context.asset_key, dg.DataVersion("mine"))
            return 1

        @dg.asset
        def result() -> Any:
            return dg.MaterializeResult(value=1, data_version=dg.DataVersion("mine, too"))

        @dg.asset
        def ours() -> int:
            return 1

        found = run([body, result, ours]).get_asset_materialization_events()
        versions = {str(event.asset_key.path[0]): event.materialization.tags["dagster/data_version"] for event in found}
        assert (versions["body"], versions["result"]) == ("mine", "mine, too")
        assert versions["ours"].startswith("sha256:6b86b273ff34fce1")

    def test_of_a_claim_and_of_multi_assets(self, run: Runner) -> None:
        @dg.multi_asset(outs={"one": dg.AssetOut(), "other": dg.AssetOut()})
        def both():  # type: ignore[no-untyped-def]
            return b"x" * 5000, run.manager.payloads().put(b"x" * 5000).claim

        versions = {
            event.materialization.tags["dagster/data_version"]
            for event in run([both]).get_asset_materialization_events()
        }
        assert len(versions) == 1
        assert versions.pop().startswith("sha256:")


class TestVersions:
    """Payloads are immutable; a pointer changes in one step."""

    @pytest.mark.parametrize("size", [5000, 20 << 20])
    def test_a_reader_keeps_what_it_began_with(self, run_there: Runner, size: int, seed: random.Random) -> None:
        contents = [seed.randbytes(size) for _ in range(2)]
        versions = iter(contents)
        seen: list[bytes] = []

        @dg.asset
        def content() -> bytes:
            return next(versions)

        materialize_again = content

        @dg.asset
        def reader(content: BinaryIO) -> None:
            first = content.read(1000)
            run_there([materialize_again])
            seen.append(first + content.read())

        run_there([content])
        run_there([content, reader], "reader")
        assert seen == [contents[0]]
        assert next(versions, None) is None
