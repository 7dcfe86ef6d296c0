"""Partitions: one by one, several at once, ranges in one run; and their keys, however evil."""

from collections.abc import Callable
from typing import Any, BinaryIO

import dagster as dg
import pandas as pd

from tests.orchestration.claim_check.kit import ALL_DAYS, DAYS, TABLE, Runner, error_of, metadata_of


def _returning(value: Any) -> Callable[[], Any]:
    return lambda: dg.Output(value)


EVIL = ["a/b", "..", "/abs", "a" * 300, "ü ,", "=value", "a", "A"]


class TestPartitions:
    def test_one_by_one(self, run_there: Runner) -> None:
        seen: list[Any] = []

        @dg.asset(partitions_def=DAYS)
        def day(context: dg.AssetExecutionContext) -> pd.DataFrame:
            return pd.DataFrame({"day": [context.partition_key]})

        @dg.asset(partitions_def=DAYS)
        def same(day: pd.DataFrame) -> None:
            seen.append(day["day"][0])

        @dg.asset
        def everything(day: dict[str, pd.DataFrame]) -> None:
            seen.append({key: frame["day"][0] for key, frame in day.items()})

        for key in ALL_DAYS:
            run_there([day, same], partition=key)
        run_there([day, everything], "everything")
        assert seen == [*ALL_DAYS, {key: key for key in ALL_DAYS}]
        assert list(seen[-1]) == ALL_DAYS

    def test_time_windows(self, run: Runner) -> None:
        seen: list[Any] = []
        days = dg.DailyPartitionsDefinition("2025-12-28", end_date="2026-01-04")

        @dg.asset(partitions_def=days)
        def day(context: dg.AssetExecutionContext) -> int:
            return int(context.partition_key[-2:])

        def week(**options: Any) -> dg.AssetsDefinition:
            @dg.asset(
                partitions_def=dg.WeeklyPartitionsDefinition("2025-12-28", end_date="2026-01-11"),
                ins={"day": dg.AssetIn(metadata=options)},
            )
            def week(day: dict[str, int]) -> None:
                seen.append(day)

            return week

        @dg.asset(
            partitions_def=days,
            ins={
                "yesterday": dg.AssetIn(
                    "day", partition_mapping=dg.TimeWindowPartitionMapping(start_offset=-1, end_offset=-1)
                )
            },
        )
        def after(yesterday: int | None) -> None:
            seen.append(yesterday)

        for key in ("2025-12-28", "2026-01-02"):
            run([day], partition=key)
        error = error_of(run([day, week()], "week", partition="2025-12-28", fails=True))
        assert "PayloadMissingError" in error
        assert "partitions '2025-12-29', '2025-12-30', '2025-12-31', '2026-01-01', '2026-01-03' has no value" in error
        run([day, week(allow_missing_partitions=True)], "week", partition="2025-12-28")
        assert seen.pop() == {"2025-12-28": 28, "2026-01-02": 2}
        run([day, after], "after", partition="2026-01-03")
        run([day, after], "after", partition="2025-12-28")
        assert seen == [2, None]

    def test_evil_keys(self, run_there: Runner) -> None:
        seen = []

        @dg.asset(partitions_def=dg.StaticPartitionsDefinition(EVIL))
        def evil(context: dg.AssetExecutionContext) -> str:
            return context.partition_key

        @dg.asset
        def reader(evil: dict[str, str]) -> None:
            seen.append(evil)

        for key in EVIL:
            run_there([evil], partition=key)
        run_there([evil, reader], "reader")
        assert seen == [{key: key for key in EVIL}]
        assert list(seen[0]) == EVIL, "in the order of their definition"
        found = [one.key for one in run_there.manager.payloads().objects.list()]
        assert all(key.startswith("pointers/assets/evil/=partitions/") for key in found if key != "rooms/pointers")

    def test_assets_and_partitions_do_not_meet(self, run: Runner) -> None:
        """Asset a/b, partition b of asset a, and asset a itself, are three."""
        seen = []
        parts = dg.StaticPartitionsDefinition(["b"])

        @dg.asset(key=["a"], partitions_def=parts)
        def partitioned() -> str:
            return "partition"

        nested = dg.asset(key=["a", "b"])(lambda: "nested")

        @dg.asset(ins={"one": dg.AssetIn(["a"]), "other": dg.AssetIn(["a", "b"])})
        def reader(one: Any, other: str) -> None:
            seen.append((one, other))

        run([partitioned], partition="b")
        run([nested])
        run([partitioned, nested, reader], "reader")
        assert seen == [("partition", "nested")]

    def test_multi_and_dynamic(self, run: Runner, instance: dg.DagsterInstance) -> None:
        seen: list[Any] = []
        grid = dg.MultiPartitionsDefinition({"zone": dg.StaticPartitionsDefinition(["b/c", ".."]), "day": DAYS})
        named = dg.DynamicPartitionsDefinition(name="named")

        @dg.asset(partitions_def=grid)
        def cell(context: dg.AssetExecutionContext) -> str:
            key = context.partition_key
            assert isinstance(key, dg.MultiPartitionKey)
            return f"{key.keys_by_dimension['zone']} on {key.keys_by_dimension['day']}"

        @dg.asset(ins={"cell": dg.AssetIn(metadata={"allow_missing_partitions": True})})
        def reader(cell: dict[str, str]) -> None:
            seen.append(cell)

        @dg.asset(partitions_def=named)
        def growing(context: dg.AssetExecutionContext) -> str:
            return context.partition_key

        @dg.asset
        def grown(growing: dict[str, str]) -> None:
            seen.append(growing)

        for zone, day in (("b/c", "2026-01-01"), ("..", "2026-01-02")):
            run([cell], partition=dg.MultiPartitionKey({"zone": zone, "day": day}))  # type: ignore[arg-type]
        run([cell, reader], "reader")
        assert {str(key): value for key, value in seen.pop().items()} == {
            "2026-01-01|b/c": "b/c on 2026-01-01",
            "2026-01-02|..": ".. on 2026-01-02",
        }
        run([growing, grown], "grown")
        instance.add_dynamic_partitions("named", ["z", "a"])
        for key in ("z", "a"):
            run([growing], partition=key)
        run([growing, grown], "grown")
        assert seen == [{}, {"z": "z", "a": "a"}]

    def test_a_range_in_one_run(self, run_there: Runner) -> None:
        seen: list[Any] = []
        static = dg.StaticPartitionsDefinition(["z", "y", "x"])

        @dg.asset(partitions_def=static, backfill_policy=dg.BackfillPolicy.single_run())
        def many(context: dg.AssetExecutionContext) -> Any:
            return {key: key * 2000 for key in context.partition_keys}

        @dg.asset(partitions_def=static, backfill_policy=dg.BackfillPolicy.single_run())
        def doubled(context: dg.AssetExecutionContext, many: dict[str, str]) -> Any:
            seen.append(list(many))
            return {key: {"length": 2 * len(value)} for key, value in many.items()}

        @dg.asset(partitions_def=static)
        def one(many: str, doubled: dict) -> None:  # type: ignore[type-arg]
            seen.append((many[:2], doubled))

        result = run_there([many, doubled], between=("z", "x"))
        shown = metadata_of(result, "many")
        assert set(shown) == {"x", "y", "z"}
        assert len({found["djp/sha256"] for found in shown.values()}) == 3, "each its own"
        assert all(found["djp/bytes"] == 2000 for found in shown.values())
        # One partition, as a range and by itself: the same code, and the same meaning.
        run_there([many, doubled], between=("y", "y"))
        run_there([many, doubled], partition="y")
        assert seen == [["z", "y", "x"], ["y"], ["y"]]
        run_there([many, doubled, one], "one", partition="y")
        assert seen.pop() == ("yy", {"length": 4000})

    def test_a_range_needs_its_values_by_partition(self, run: Runner) -> None:
        for value, why in (
            (TABLE, "returns Table"),
            ({"2026-01-01": 1}, "differs from them in ['2026-01-02']"),
            ({"2026-01-01": 1, "2026-01-02": 2, "2026-01-03": 3}, "differs from them in ['2026-01-03']"),
        ):
            asset = dg.asset(name="many", partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())(
                _returning(value)
            )
            error = error_of(run([asset], between=("2026-01-01", "2026-01-02"), fails=True))
            assert "InvalidSettingError" in error
            assert why in error

    def test_a_dict_of_one_is_the_value_or_holds_it(self, run: Runner) -> None:
        seen: dict[str, Any] = {}
        one_day = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-01-02")

        @dg.asset(partitions_def=one_day)
        def document() -> dict[str, int]:
            return {"2026-01-01": 4}

        @dg.asset(partitions_def=one_day)
        def number() -> int:
            return 4

        @dg.asset(partitions_def=one_day)
        def in_a_partition(document: dict[str, int], number: dict[str, int]) -> None:
            seen["in a partition"] = (document, number)

        @dg.asset
        def over_all(document: dict[str, dict], number: dict[str, int]) -> None:  # type: ignore[type-arg]
            seen["over all"] = (document, number)

        @dg.asset
        def plain(document, number: int) -> None:  # type: ignore[no-untyped-def]
            seen["plain"] = (document, number)

        told = {"djp/by_partition": True}

        @dg.asset(partitions_def=one_day, ins={"document": dg.AssetIn(metadata=told)})
        def told_so(document: dict[str, dict]) -> None:  # type: ignore[type-arg]
            seen["told so"] = document

        day = "2026-01-01"
        everything = [document, number, in_a_partition, over_all, plain, told_so]
        run(everything, "document", "number", "in_a_partition", "told_so", partition=day)
        run(everything, "over_all", "plain")
        assert seen == {
            "in a partition": ({day: 4}, {day: 4}),
            "over all": ({day: {day: 4}}, {day: 4}),
            "plain": ({day: 4}, 4),
            "told so": {day: {day: 4}},
        }

    def test_missing_ones_are_named(self, run: Runner) -> None:
        @dg.asset(partitions_def=DAYS)
        def day() -> int:
            return 1

        @dg.asset
        def reader(day: dict[str, int]) -> None:
            raise AssertionError

        run([day], partition="2026-01-02")
        error = error_of(run([day, reader], "reader", fails=True))
        assert "PayloadMissingError" in error
        assert "asset 'day', partitions '2026-01-01', '2026-01-03', '2026-01-04' has no value" in error
        assert "allow_missing_partitions" in error

    def test_several_need_a_dict(self, run: Runner) -> None:
        @dg.asset(partitions_def=DAYS)
        def day() -> pd.DataFrame:
            return TABLE.to_pandas()

        @dg.asset
        def reader(day: pd.DataFrame) -> None:
            raise AssertionError

        error = error_of(run([day, reader], "reader", fails=True))
        assert "annotate it dict[str, DataFrame]" in error

    def test_streams_of_many_partitions(self, run: Runner) -> None:
        seen = []

        @dg.asset(partitions_def=DAYS)
        def day(context: dg.AssetExecutionContext) -> bytes:
            return context.partition_key.encode() * 1000

        @dg.asset
        def reader(day: dict[str, BinaryIO]) -> None:
            seen.append({key: stream.read(10) for key, stream in day.items()})

        for key in ALL_DAYS:
            run([day], partition=key)
        run([day, reader], "reader")
        assert seen == [{key: key.encode() for key in ALL_DAYS}]
