"""`ClaimCheckIOManager` in real runs: what is stored, what inputs get, what is shown, what is refused."""

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import dagster as dg
import msgspec
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import djp_dagster as djp
from djp_dagster.claim_check.pointers import Pointer, asset_key, op_key, read_pointer, write_pointer
from djp_dagster.claim_check.serializers.kinds import PARQUET, PICKLE, Kind
from djp_dagster.claim_check.values import Inline
from djp_dagster.errors import (
    InvalidSettingError,
    PayloadCorruptError,
    PayloadExpiredError,
    PayloadForbiddenError,
    PayloadMissingError,
)
from tests.orchestration.claim_check.kit import (
    ALL_DAYS,
    DAYS,
    REPOSITORY,
    TABLE,
    Runner,
    error_of,
    lasting_jobs,
    metadata_of,
    start_job,
)


@dataclasses.dataclass
class Point:
    x: int


def made(name: str, value: Any, **more: Any) -> dg.AssetsDefinition:
    """An asset of that value."""
    return dg.asset(name=name, **more)(lambda: dg.Output(value))


class TestForms:
    """What is stored, and what inputs get."""

    @pytest.mark.parametrize("threshold", ["0", "1MiB"])
    def test_of_each_kind(self, place: Any, threshold: str, tmp_path: Path, instance: dg.DagsterInstance) -> None:
        (tmp_path / "a.csv").write_text("a,b\n")
        values: dict[str, Any] = {
            "pandas_": TABLE.to_pandas(),
            "arrow": TABLE,
            "polars_": pl.from_arrow(TABLE),
            "plain": b"\x00",
            "text": "ü",
            "document": {"a": [1, None]},
            "nothing": None,
            "point": Point(4),
            "file": tmp_path / "a.csv",
            "streamed": iter([b"a", b"b"]),
        }
        seen: dict[str, Any] = {}

        @dg.asset
        def alike(pandas_, arrow, polars_, plain, text, document, nothing, point, file, streamed) -> None:  # type: ignore[no-untyped-def]
            seen.update(pandas_=pandas_, arrow=arrow, polars_=polars_)
            seen["alike"] = [plain, text, document, nothing, point, file.read_text(), streamed.read()]

        @dg.asset
        def crossed(
            pandas_: pa.Table,
            arrow: pl.LazyFrame,
            polars_: pd.DataFrame,
            plain: BinaryIO,
            text: bytes,
            document: dict,  # type: ignore[type-arg]
            nothing: pd.DataFrame | None,
            point: Point,
            file: str,
            streamed: Path,
        ) -> None:
            seen["crossed"] = [pandas_.num_rows, arrow.collect().height, len(polars_), plain.read(), text, document]
            seen["crossed"] += [nothing, point, file, streamed.read_bytes()]

        @dg.asset
        def claims(pandas_: djp.Claim, plain: djp.Claim) -> djp.Claim:
            seen["claim"] = pandas_
            return plain

        @dg.asset
        def of_a_claim(claims: bytes) -> None:
            seen["of a claim"] = claims

        result = dg.materialize(
            [*(made(name, value) for name, value in values.items()), alike, crossed, claims, of_a_claim],
            instance=instance,
            resources={"io_manager": djp.ClaimCheckIOManager(store=place, threshold=threshold)},
        )
        assert result.success
        pd.testing.assert_frame_equal(seen["pandas_"], values["pandas_"])
        assert seen["arrow"] == TABLE
        assert seen["polars_"].equals(values["polars_"])
        assert seen["alike"] == [b"\x00", "ü", {"a": [1, None]}, None, {"x": 4}, "a,b\n", b"ab"]
        assert seen["crossed"][:5] == [1000, 1000, 1000, b"\x00", "ü".encode()]
        assert seen["crossed"][5:] == [{"a": [1, None]}, None, Point(4), "a,b\n", b"ab"]
        assert isinstance(seen["claim"], djp.Claim)
        assert seen["of a claim"] == b"\x00"

    def test_batches_of_a_table(self, run: Runner) -> None:
        seen = []

        @dg.asset
        def table() -> pa.RecordBatchReader:
            return pa.RecordBatchReader.from_batches(TABLE.schema, TABLE.to_batches(max_chunksize=10))

        @dg.asset
        def reader(table: pa.RecordBatchReader) -> None:
            seen.append(sum(batch.num_rows for batch in table))

        run([table, reader])
        assert seen == [1000]

    def test_files_live_as_long_as_the_run(self, run: Runner) -> None:
        seen: list[Any] = []

        @dg.asset
        def reader(text: Path, other: BinaryIO) -> None:
            other.read(1)
            seen.extend([text, other])

        @dg.asset(deps=[reader])
        def later() -> None:
            assert seen[0].read_text() == "x" * 5000

        run([made("text", "x" * 5000), made("other", "x" * 5000), reader, later])
        assert not seen[0].exists()
        assert seen[1].closed

    def test_what_is_loaded_outside_of_runs_lives_on(self, run: Runner) -> None:
        text = made("text", "x" * 5000)
        run([text])
        defs = dg.Definitions([text], resources={"io_manager": run.manager})
        path = defs.load_asset_value("text", python_type=Path, instance=run.instance)
        assert path.read_text() == "x" * 5000

    def test_a_wrong_annotation_names_both(self, run: Runner) -> None:
        @dg.asset
        def reader(table: dict) -> None:  # type: ignore[type-arg]
            raise AssertionError

        error = error_of(run([made("table", TABLE), reader], fails=True))
        assert "InvalidSettingError" in error
        assert "asset 'table'" in error
        assert "dict is wanted" in error

    def test_pickles_when_asked_for(
        self, run: Runner, instance: dg.DagsterInstance, folder: djp.LocalPayloadStore
    ) -> None:
        seen = []

        @dg.asset
        def reader(odd: dict) -> None:  # type: ignore[type-arg]
            seen.append(odd)

        odd = made("odd", {"a": {1, 2}})
        assert "InvalidSettingError" in error_of(run([odd], fails=True))
        allowing = Runner(instance, djp.ClaimCheckIOManager(store=folder, allow_pickle=True))
        allowing([odd, reader])
        assert seen == [{"a": {1, 2}}]
        assert "PayloadForbiddenError" in error_of(run([odd, reader], "reader", fails=True))

    def test_a_missing_value_is_named(self, run: Runner) -> None:
        @dg.asset
        def reader(text: str) -> None:
            raise AssertionError

        run([made("another", "x")])
        error = error_of(run([made("text", "x"), reader], "reader", fails=True))
        assert "PayloadMissingError" in error
        assert "asset 'text' has no value" in error
        assert "materialize it" in error

    def test_the_old_value_stays_if_storing_fails(self, run: Runner) -> None:
        run([made("value", "good")])
        run([made("value", {1, 2})], fails=True)

        def failing() -> Any:
            yield b"x" * 5000
            raise RuntimeError("the source died")

        run([made("value", failing())], fails=True)
        assert (
            dg.Definitions([made("value", 1)], resources={"io_manager": run.manager}).load_asset_value(
                "value", instance=run.instance
            )
            == "good"
        )


class TestMetadata:
    """What Dagster shows of a stored value."""

    def test_of_a_table(self, run_there: Runner) -> None:
        table = made("table", TABLE.to_pandas(), metadata={"djp/threshold": "0"})
        first, again = (metadata_of(run_there([table]), "table")[None] for _ in range(2))
        assert first["djp/uri"].startswith(f"{run_there.manager.payloads().uri}/sha256/{first['djp/sha256'][:2]}/")
        assert len(first["djp/sha256"]) == 12
        assert first["djp/stored_bytes"] == first["djp/bytes"] > 1000
        assert (first["djp/kind"], first["djp/media_type"]) == ("pandas", "application/vnd.apache.parquet")
        assert isinstance(first["djp/seconds"], float)
        assert isinstance(first["djp/mb_per_second"], float)
        assert first["djp/inline"] is False
        assert [first["djp/deduplicated"], again["djp/deduplicated"]] == [False, True]
        assert first["dagster/row_count"] == 1000
        assert [column.name for column in first["dagster/column_schema"].columns] == ["n", "s"]

    def test_of_a_small_value(self, run: Runner) -> None:
        shown = metadata_of(run([made("document", {"a": 1})]), "document")[None]
        assert (shown["djp/inline"], shown["djp/bytes"], shown["djp/stored_bytes"]) == (True, 7, 7)
        assert "djp/uri" not in shown

    def test_of_compressible_text(self, run: Runner) -> None:
        shown = metadata_of(run([made("text", "x" * 1_000_000)]), "text")[None]
        assert shown["djp/bytes"] == 1_000_000 > 100 * shown["djp/stored_bytes"]

    def test_what_the_asset_says_itself_wins(self, run: Runner) -> None:
        @dg.asset
        def table():  # type: ignore[no-untyped-def]
            return dg.Output(TABLE, metadata={"dagster/row_count": 7, "mine": 1})

        shown = metadata_of(run([table]), "table")[None]
        assert (shown["dagster/row_count"], shown["mine"], shown["djp/kind"]) == (7, 1, "arrow")

    def test_options_of_an_asset(self, run: Runner) -> None:
        options = {"djp/threshold": "1MiB", "djp/media_type": "image/png"}
        shown = metadata_of(run([made("image", b"x" * 100_000, metadata=options)]), "image")[None]
        assert (shown["djp/inline"], shown["djp/media_type"]) == (True, "image/png")
        for wrong in ({"djp/threshold": "9MiB"}, {"djp/threshold": "much"}, {"djp/media_type": "nonsense"}):
            assert "Invalid" in error_of(run([made("image", b"x", metadata=wrong)], fails=True))

    def test_many_columns_have_no_schema(self, run: Runner) -> None:
        shown = metadata_of(run([made("wide", pd.DataFrame({f"c{n}": [1] for n in range(501)}))]), "wide")[None]
        assert "dagster/column_schema" not in shown
        assert shown["dagster/row_count"] == 1


class TestSettings:
    @pytest.mark.parametrize(
        "wrong",
        [{"threshold": "much"}, {"threshold": "5MiB"}, {"threshold": -1}, {"op_outputs_expire_in": "soon"}],
        ids=str,
    )
    def test_wrong_ones_are_refused_at_once(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidSettingError, match=next(iter(wrong))):
            djp.ClaimCheckIOManager(**wrong)

    def test_numbers_do(self) -> None:
        assert djp.ClaimCheckIOManager(threshold=1024).threshold == "1024"  # type: ignore[arg-type]

    def test_from_the_environment(
        self, instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("THRESHOLD", "1KiB")
        monkeypatch.setenv("FOLDER", str(tmp_path))
        io = djp.ClaimCheckIOManager(
            store=djp.LocalPayloadStore(folder=dg.EnvVar("FOLDER")),
            threshold=dg.EnvVar("THRESHOLD"),
            op_outputs_expire_in=None,
        )
        shown = metadata_of(Runner(instance, io)([made("text", "x" * 2000)]), "text")[None]
        assert shown["djp/uri"].startswith(f"{tmp_path.as_uri()}/assets/sha256/")

    def test_the_default_is_under_dagster_home(
        self, lasting: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
        Runner(lasting, djp.ClaimCheckIOManager())([made("text", "x")])
        assert list((tmp_path / "home").rglob("pointers/assets/text/=value"))

    def test_nothing_is_asked_and_made_at_definition_time(self, tmp_path: Path) -> None:
        """A server that is not there, a folder that cannot be made, and no library of tables."""
        code = f"""
import socket, sys
import dagster as dg, djp_dagster as djp
socket.socket.connect = socket.getaddrinfo = None
@dg.asset
def a(): return 1
@dg.asset
def b(a: dict[str, int]): return 1
stores = [djp.LocalPayloadStore(folder="/proc/nowhere"), djp.LocalPayloadStore(folder={str(tmp_path / "no")!r})]
from dagster_aws.s3 import S3Resource
stores.append(djp.S3PayloadStore(bucket="none", s3=S3Resource(endpoint_url="http://127.0.0.1:9")))
for store in stores:
    defs = dg.Definitions([a, b], resources={{"io_manager": djp.ClaimCheckIOManager(store=store)}})
    dg.Definitions.validate_loadable(defs)
assert not {{"pandas", "pyarrow", "polars"}} & set(sys.modules), set(sys.modules)
"""
        subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=120)
        assert list(tmp_path.iterdir()) == []


class TestChecksAndLoading:
    def test_checks(self, run: Runner) -> None:
        seen: list[Any] = []

        @dg.asset(partitions_def=DAYS)
        def day(context: dg.AssetExecutionContext) -> pd.DataFrame:
            return pd.DataFrame({"day": [context.partition_key]})

        @dg.asset_check(asset=day)
        def over_all(day: dict[str, pd.DataFrame]) -> dg.AssetCheckResult:
            seen.append(list(day))
            return dg.AssetCheckResult(passed=True)

        plain = made("plain", TABLE)

        @dg.asset_check(asset=plain)
        def of_plain(plain: pa.Table) -> dg.AssetCheckResult:
            seen.append(plain.num_rows)
            return dg.AssetCheckResult(passed=True)

        run([plain, of_plain])
        for key in ALL_DAYS:
            run([day], partition=key)
        checks = dg.materialize(
            [day, over_all],
            selection=dg.AssetSelection.checks_for_assets(day),
            instance=run.instance,
            resources={"io_manager": run.manager},
        )
        assert checks.success
        assert seen == [1000, ALL_DAYS]

    def test_load_asset_value(self, run_there: Runner) -> None:
        table = made("table", TABLE)

        @dg.asset(partitions_def=DAYS)
        def day(context: dg.AssetExecutionContext) -> dict[str, str]:
            return {"day": context.partition_key}

        run_there([table])
        for key in ALL_DAYS[:2]:
            run_there([day], partition=key)
        defs = dg.Definitions([table, day], resources={"io_manager": run_there.manager})
        instance = run_there.instance
        assert defs.load_asset_value("table", instance=instance) == TABLE
        frame = defs.load_asset_value("table", python_type=pd.DataFrame, instance=instance)
        pd.testing.assert_frame_equal(frame, TABLE.to_pandas())
        assert defs.load_asset_value("day", partition_key=ALL_DAYS[1], instance=instance) == {"day": ALL_DAYS[1]}
        one = defs.load_asset_value("day", python_type=dict[str, str], partition_key=ALL_DAYS[1], instance=instance)
        assert one == {"day": ALL_DAYS[1]}
        with defs.get_asset_value_loader(instance=instance) as loader:
            several = loader.load_asset_value("day", partition_key_range=dg.PartitionKeyRange(*ALL_DAYS[:2]))
            assert several == {key: {"day": key} for key in ALL_DAYS[:2]}
        with pytest.raises(InvalidSettingError, match="partition_key"):
            defs.load_asset_value("day", instance=instance)
        with pytest.raises(PayloadMissingError, match=r"asset 'day', partition '2026-01-04'"):
            defs.load_asset_value("day", partition_key=ALL_DAYS[3], instance=instance)

    def test_without_a_run(self, manager: djp.ClaimCheckIOManager) -> None:
        with dg.build_output_context(asset_key=["a", "b"]) as context:
            manager.handle_output(context, TABLE)
        with dg.build_input_context(asset_key=["a", "b"]) as there:
            assert manager.load_input(there) == TABLE


class TestOps:
    def test_re_execution_dynamic_outputs_and_retries(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from tests.orchestration.claim_check import jobs

        job = dg.reconstructable(jobs.summing)
        with lasting_jobs(tmp_path, monkeypatch) as instance:
            with dg.execute_job(job, instance=instance) as first:
                assert not first.success
            (tmp_path / "may_add").touch()
            again = dg.ReexecutionOptions.from_failure(first.run_id, instance)
            with dg.execute_job(job, instance=instance, reexecution_options=again) as second:
                assert second.success
                assert second.output_for_node("retried") == sum(range(1000))
            counts = {name: jobs.times(name) for name in ("numbers", "pieces", "total", "add", "retried")}
        assert counts == {"numbers": 1, "pieces": 1, "total": 3, "add": 2, "retried": 3}
        found = [key.key for key in djp.open_payload_store(tmp_path / "payloads" / "assets").objects.list()]
        pointers = [key for key in found if key.startswith("pointers/")]
        assert {key.split("/")[2] for key in pointers} == {first.run_id, second.run_id}
        assert {key.split("/")[1] for key in pointers} == {"ops"}
        payloads = [key for key in found if "sha256" in key]
        assert payloads
        assert all(key.startswith("expiring/") for key in payloads)

    def test_steps_in_processes_of_their_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from tests.orchestration.claim_check import jobs

        with lasting_jobs(tmp_path, monkeypatch) as instance:
            with dg.execute_job(dg.reconstructable(jobs.chain), instance=instance) as result:
                assert result.success
            seen = jobs.defs.load_asset_value("downstream", instance=instance)
        assert len({seen["written_by"], seen["read_by"], os.getpid()}) == 3

    def test_two_runs_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two processes materialize one asset at the same time: both succeed, and one value is there, whole."""
        from tests.orchestration.claim_check import jobs

        with lasting_jobs(tmp_path, monkeypatch) as instance:
            both = [start_job("contend") for _ in range(2)]
            try:
                assert [process.wait(timeout=150) for process in both] == [0, 0]
            finally:
                for process in both:
                    process.kill()
            store = djp.open_payload_store(tmp_path / "payloads" / "assets")
            pointer = read_pointer(store, asset_key(["contended"]))
            assert pointer is not None
            frame = jobs.defs.load_asset_value("contended", instance=instance)
            assert set(frame["run"]) == {pointer.run_id}

    def test_expiry(self, instance: dg.DagsterInstance, folder: djp.LocalPayloadStore) -> None:
        io = djp.ClaimCheckIOManager(store=folder, threshold="1KiB", op_outputs_expire_in="2h")

        @dg.op
        def small() -> int:
            return 1

        @dg.op
        def large() -> bytes:
            return b"x" * 5000

        @dg.op
        def use(one: int, other: bytes) -> None:
            """Read both."""

        @dg.job(resource_defs={"io_manager": io})
        def both() -> None:
            use(small(), large())

        result = both.execute_in_process(instance=instance)
        store = io.payloads()
        for name in ("small", "large"):
            pointer = read_pointer(store, op_key([result.run_id, name, "result"]))
            assert pointer is not None
            assert pointer.expires_at is not None
            assert 7100 < pointer.expires_at - time.time() <= 7201
            assert pointer.claim is None or (pointer.claim.expires_at or 0) > pointer.expires_at
        key = op_key(["r", "small", "result"])
        write_pointer(
            store, key, Pointer(kind="json", run_id="r", stored_at=1.0, inline=NULL, expires_at=time.time() - 1)
        )
        with pytest.raises(PayloadExpiredError, match=r"output 'result' of step 'small': .*op_outputs_expire_in"):
            io.load_input(input_of_op("r", "small"))

    def test_graph_assets(self, run: Runner) -> None:
        @dg.op
        def inner() -> pd.DataFrame:
            return TABLE.to_pandas()

        @dg.op
        def outer(frame: pa.Table) -> int:
            return int(frame.num_rows)

        @dg.graph_asset
        def counted() -> Any:
            return outer(inner())

        result, store = run([counted]), run.manager.payloads()
        assert read_pointer(store, op_key([result.run_id, "counted.inner", "result"])) is not None
        assert read_pointer(store, asset_key(["counted"])) is not None

    def test_a_missing_one_is_named(self, manager: djp.ClaimCheckIOManager) -> None:
        manager.payloads().objects.replace_document("pointers/ops/another", b"")
        with pytest.raises(PayloadMissingError, match="output 'result' of step 'make'"):
            manager.load_input(input_of_op("gone", "make"))


NULL = Inline(b"null", "74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b", "application/json")


def input_of_op(run_id: str, step: str) -> dg.InputContext:
    upstream = dg.build_output_context(step_key=step, name="result", run_id=run_id)
    return dg.build_input_context(upstream_output=upstream)


class Boom:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickles-ran",)


class TestAttacks:
    """Somebody who can write to the store says what is the value of ``text``."""

    @pytest.fixture
    def attack(self, run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")

        def with_pointer(annotation: Any = Any, *, body: bytes | None = None, **pointer: Any) -> str:
            store = run.manager.payloads()
            run([made("text", "harmless")])
            if body is not None:
                store.objects.replace_document(asset_key(["text"]), body)
            else:
                write_pointer(store, asset_key(["text"]), Pointer(run_id="r", stored_at=1.0, **pointer))

            def reader(text: Any) -> None:
                raise AssertionError("it was handed out")

            reader.__annotations__["text"] = annotation
            error = error_of(run([made("text", ""), dg.asset(reader)], "reader", fails=True))
            assert list((tmp_path / "here").iterdir()) == [], "code ran"
            return error

        return with_pointer

    @pytest.mark.parametrize(
        "uri",
        [
            "s3://another/assets/sha256/aa/" + "b" * 62,
            "file:///etc/passwd",
            "file:///proc/self/environ",
            "http://127.0.0.1:9/metadata",
            "https://example.org/x",
        ],
    )
    def test_claims_that_lead_out_of_the_store(self, attack: Any, uri: str) -> None:
        claim = djp.Claim(uri=uri, media_type=PARQUET)
        for annotation in (Any, djp.Claim, bytes, Path, pd.DataFrame, pl.LazyFrame, pa.RecordBatchReader):
            assert "PayloadForbiddenError" in attack(annotation, kind="claim", claim=claim)

    @pytest.mark.parametrize("annotation", [Any, dict, pd.DataFrame, str], ids=str)
    def test_pickles(self, attack: Any, annotation: Any) -> None:
        content = pickle.dumps(Boom())
        payload = Inline(content, hashlib.sha256(content).hexdigest(), PICKLE)
        kinds: list[Kind] = ["pickle", "json", "pandas"]
        for kind in kinds:
            assert "PayloadForbiddenError" in attack(annotation, kind=kind, inline=payload)

    @pytest.mark.parametrize("change", [("json", "os.system"), ("json", "x" * 20), ("null", "nul1")], ids=str)
    def test_documents(self, attack: Any, change: tuple[str, str], run: Runner) -> None:
        pointer = Pointer(kind="json", run_id="r", stored_at=1.0, inline=NULL)
        document = msgspec.msgpack.decode(msgspec.msgpack.encode(pointer))
        document["kind"] = change[1] if change[0] == "json" else "json"
        document["inline"]["content"] = b"nul1" if change[0] == "null" else b"null"
        assert "PayloadCorruptError" in attack(body=msgspec.msgpack.encode(document))

    def test_garbage(self, attack: Any) -> None:
        for body in (b"", b"\x80", pickle.dumps(Boom()), b"\xc1" * 100):
            assert "PayloadCorruptError" in attack(body=body)


def test_the_errors_are_those_of_this_package() -> None:
    for error in (PayloadCorruptError, PayloadForbiddenError, PayloadMissingError, PayloadExpiredError):
        assert issubclass(error, djp.DjpError)
