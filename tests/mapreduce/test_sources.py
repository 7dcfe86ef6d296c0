"""JSON Lines, CSV, Parquet, topics; and buckets, through a real S3 server."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import djp_dagster as djp
from djp_dagster.claim_check.s3_settings import S3Settings
from djp_dagster.errors import InvalidSettingError, PayloadStoreRefusedError, SourceError, UnknownTopicError
from djp_dagster.mapreduce.sources import text as text_module
from djp_dagster.streams.records import TopicPartition
from tests.claim_check.kit import s3_settings
from tests.mapreduce.kit import blocks_of, counted, records_of, text_of, words
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3_faults import CutResponse, Refuse
from tests.servers.seaweedfs import SeaweedServer


@pytest.fixture(params=[7, 300, "1MiB"])
def split_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 50)
    return request.param


class TestJsonLines:
    def test_records(self, tmp_path: Path, seed: random.Random, split_bytes: Any) -> None:
        records = [{"n": number, "text": line} for number, line in enumerate(text_of(seed, 40))]
        path = tmp_path / "a.jsonl"
        path.write_text("\n\n" + "\n".join(json.dumps(one, ensure_ascii=False) for one in records) + "\n \n")
        source = djp.JsonLines(path, split_bytes=split_bytes)
        assert records_of(source) == records
        assert sum(block.count for block in blocks_of(source)) == len(records)

    def test_what_is_no_json_is_bad(self, tmp_path: Path, split_bytes: Any) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"a": 1}\n\n{"a": \n{"a": 2}\nnonsense')
        blocks = blocks_of(djp.JsonLines(path, split_bytes=split_bytes))
        assert [record for block in blocks for record in block.records] == [{"a": 1}, {"a": 2}]
        assert [(one.position, one.raw) for block in blocks for one in block.bad] == [
            (10, b'{"a": '),
            (26, b"nonsense"),
        ]

    def test_a_mapper_that_raises_behind_blank_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('\n\n{"a": 1}\n\n{"b": 2}\n')
        result = djp.map_reduce(
            lambda record: [(record["a"], 1)], djp.JsonLines(path), combine=djp.Sum(), max_bad_fraction=0.9
        )
        assert result.to_dict() == {1: 1}
        assert [(one.position, one.raw) for one in result.bad_records] == [(12, b'{"b": 2}')]

    @pytest.mark.parametrize("form", [True, "pandas"])
    def test_as_tables(self, tmp_path: Path, split_bytes: Any, form: Any) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"k": f"k{number % 3}", "v": number}) + "\n" for number in range(50)))

        def mapper(table: Any) -> Any:
            frame = table if form == "pandas" else table.to_pandas()
            return frame.groupby("k")["v"].sum()

        result = djp.map_reduce(mapper, djp.JsonLines(path, split_bytes=split_bytes), combine=djp.Sum(), batch=form)
        assert result.to_dict() == {f"k{rest}": sum(range(rest, 50, 3)) for rest in range(3)}
        assert result.report.records == 50

    def test_no_table(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"a": 1}\n{"a": "x"}\n')
        with pytest.raises(SourceError, match="cannot become a table"):
            djp.map_reduce(lambda table: {}, djp.JsonLines(path), combine=djp.Sum(), batch=True)


class TestCsv:
    @pytest.mark.parametrize("quoted_breaks", [False, True])
    def test_records(self, tmp_path: Path, seed: random.Random, split_bytes: Any, quoted_breaks: bool) -> None:
        texts = [line.replace("\n", " ") for line in text_of(seed, 40)]
        if quoted_breaks:
            texts = [text.replace(" ", "\r\n", 1) for text in texts]
        rows = [{"n": str(number), "text": f'{text}, "so"'} for number, text in enumerate(texts)]
        path = tmp_path / "a.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["n", "text"])
            writer.writeheader()
            writer.writerows(rows)
        source = djp.CsvFiles(path, split_bytes=split_bytes, breaks_in_quotes=quoted_breaks)
        assert records_of(source) == rows
        if not quoted_breaks:
            tables = [block.whole for block in blocks_of(source, "arrow")]
            assert [row["text"] for table in tables for row in table.to_pylist()] == [row["text"] for row in rows]

    @pytest.mark.parametrize("quoted_breaks", [False, True])
    def test_other_numbers_of_fields_are_bad(self, tmp_path: Path, quoted_breaks: bool) -> None:
        path = tmp_path / "a.csv"
        path.write_text("a,b\n1,2\n3\n4,5,6\n7,8\n")
        blocks = blocks_of(djp.CsvFiles(path, breaks_in_quotes=quoted_breaks))
        assert [record for block in blocks for record in block.records] == [{"a": "1", "b": "2"}, {"a": "7", "b": "8"}]
        bad = [one for block in blocks for one in block.bad]
        assert [one.reason.partition(": ")[2] or one.reason for one in bad] == [
            f"{number} fields, and the header has 2" for number in (1, 3)
        ]
        assert sum(block.count for block in blocks) == 4

    def test_without_a_header_and_with_another_delimiter(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tsv"
        path.write_text("1\t2\n3\t4\n")
        assert records_of(djp.CsvFiles(path, columns=["x", "y"], delimiter="\t")) == [
            {"x": "1", "y": "2"},
            {"x": "3", "y": "4"},
        ]

    def test_no_header(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_bytes(b"\xff\xfe\n1,2\n")
        with pytest.raises(SourceError, match="has no header"):
            records_of(djp.CsvFiles(path))

    def test_compressed(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv.gz"
        path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
        assert records_of(djp.CsvFiles(path)) == [{"a": "1", "b": "2"}]


class TestParquet:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        frame = pd.DataFrame({"k": [f"k{number % 7}" for number in range(1000)], "v": range(1000), "w": 0})
        pq.write_table(pa.Table.from_pandas(frame), tmp_path / "a.parquet", row_group_size=90)
        return tmp_path / "a.parquet"

    @pytest.mark.parametrize("limit", [1, 2000, "1MiB"])
    def test_records(self, path: Path, limit: Any) -> None:
        source = djp.ParquetFiles(path, columns=["k", "v"], split_bytes=limit)
        assert len(source.plan()) == {1: 12, "1MiB": 1}.get(limit, len(source.plan()))
        assert records_of(source) == [{"k": f"k{number % 7}", "v": number} for number in range(1000)]

    @pytest.mark.parametrize("form", [True, "pandas"])
    def test_as_tables(self, path: Path, form: Any) -> None:
        def mapper(batch: Any) -> Any:
            frame = batch if form == "pandas" else batch.to_pandas()
            return frame.groupby("k")["v"].sum()

        result = djp.map_reduce(mapper, djp.ParquetFiles(path, split_bytes=1), combine=djp.Sum(), batch=form)
        assert result.to_dict() == {f"k{rest}": sum(range(rest, 1000, 7)) for rest in range(7)}

    def test_a_bad_row_is_named(self, path: Path) -> None:
        def mapper(row: dict[str, Any]) -> Any:
            if row["v"] == 567:
                raise ValueError("no")
            return [(row["k"], 1)]

        result = djp.map_reduce(mapper, djp.ParquetFiles(path, split_bytes=1), combine=djp.Sum(), max_bad_fraction=0.1)
        assert [one.position for one in result.bad_records] == [567]
        assert result.report.records == 1000

    def test_a_damaged_one(self, path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        with pytest.raises(SourceError, match="damaged, or no Parquet"):
            djp.ParquetFiles(path).plan()

    def test_an_empty_one(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"k": pa.array([], pa.string())}), tmp_path / "e.parquet")
        assert records_of(djp.ParquetFiles(tmp_path / "e.parquet")) == []


class TestTopics:
    @pytest.fixture
    def orders(self) -> djp.Topic:
        return djp.Topic("orders", partitions=3, key="user")

    @pytest.fixture
    def file(self, tmp_path: Path, orders: djp.Topic) -> Path:
        with djp.open_stream(tmp_path / "stream.db") as stream:
            stream.create_topic(orders)
            for start in range(0, 1000, 100):
                events = [orders.event(user=f"u{n % 10}", amount=n) for n in range(start, start + 100)]
                stream.publish(orders, events)
        return tmp_path / "stream.db"

    @staticmethod
    def amounts(record: djp.Record) -> Any:
        yield record.data["user"], record.data["amount"]

    @pytest.mark.parametrize("engine", ["inline", "processes"])
    def test_all_records(self, file: Path, orders: djp.Topic, engine: str) -> None:
        source = djp.TopicRange(orders, stream=file, split_events=70)
        result = djp.map_reduce(self.amounts, source, combine=djp.Sum(), engine=engine)
        assert result.to_dict() == {f"u{rest}": sum(range(rest, 1000, 10)) for rest in range(10)}
        assert result.report.records == 1000
        assert sum(result.report.sources.values()) == len(source.plan()) >= 15

    def test_ranges_and_times(self, file: Path, orders: djp.Topic) -> None:
        with djp.open_stream(file) as stream:
            ends = {at.partition: span.end for at, span in stream.log.spans(["orders"]).items()}
            middle = stream.log.append_time_of(TopicPartition("orders", 0), ends[0] // 2)
        assert middle is not None
        since = dict.fromkeys(ends, 5)
        until = {partition: end - 5 for partition, end in ends.items()}
        found = records_of(djp.TopicRange(orders, stream=file, since=since, until=until))
        assert {(one.partition, one.offset) for one in found} == {
            (partition, offset) for partition, end in ends.items() for offset in range(5, end - 5)
        }
        moment = datetime.fromtimestamp(middle / 1e6, timezone.utc)
        late = records_of(djp.TopicRange("orders", stream=file, since=moment))
        early = records_of(djp.TopicRange("orders", stream=file, until=moment))
        assert 0 < len(late) < 1000
        assert len(late) + len(early) == 1000
        assert records_of(djp.TopicRange("orders", stream=file, since=datetime(2090, 1, 1, tzinfo=timezone.utc))) == []

    def test_what_was_read_can_be_read_again(self, file: Path, orders: djp.Topic) -> None:
        splits = djp.TopicRange(orders, stream=file).plan()
        ends = {split.partition: split.end for split in splits}
        with djp.open_stream(file) as stream:
            stream.publish(orders, [orders.event(user="u1", amount=10**6)])
        again = djp.map_reduce(self.amounts, djp.TopicRange(orders, stream=file, until=ends), combine=djp.Max())
        assert max(again.to_dict().values()) == 999

    def test_as_tables(self, file: Path, orders: djp.Topic) -> None:
        source = djp.TopicRange(orders, stream=file)
        for form in (True, "pandas"):
            result = djp.map_reduce(lambda table: [("rows", len(table))], source, combine=djp.Sum(), batch=form)
            assert result.to_dict() == {"rows": 1000}

    def test_errors(self, file: Path, tmp_path: Path, orders: djp.Topic) -> None:
        with pytest.raises(InvalidSettingError, match="which stream has topic 'orders'"):
            djp.TopicRange(orders).plan()
        with pytest.raises(UnknownTopicError):
            djp.TopicRange("nothing", stream=file).plan()
        with pytest.raises(InvalidSettingError, match="has no time zone"):
            djp.TopicRange(orders, stream=file, since=datetime(2026, 1, 1)).plan()  # noqa: DTZ001
        (split, *_) = djp.TopicRange(orders, stream=file).plan()
        for part in tmp_path.glob("stream.db*"):
            part.unlink() if part.is_file() else None
        with pytest.raises(SourceError, match="another stream"):
            list(split.blocks("records"))


class TestBuckets:
    @pytest.fixture
    def settings(self, s3_server: SeaweedServer) -> S3Settings:
        return S3Settings(**s3_settings(s3_server))

    @pytest.fixture
    def bucket(self, s3_server: SeaweedServer, s3_bucket: str, seed: random.Random) -> dict[str, list[str]]:
        client, texts = s3_server.client(), {}
        for key in ("logs/a.log", "logs/b.log.gz", "logs/deep/c.log", "other/d.log"):
            texts[key] = text_of(seed, 300)
            raw = "\n".join(texts[key]).encode()
            client.put_object(Bucket=s3_bucket, Key=key, Body=gzip.compress(raw) if key.endswith("gz") else raw)
        return {"": [s3_bucket], **texts}

    @pytest.mark.parametrize("engine", ["inline", "processes"])
    def test_by_range(self, bucket: dict[str, list[str]], settings: S3Settings, engine: str) -> None:
        source = djp.TextFiles(f"s3://{bucket[''][0]}/logs/**", split_bytes=2000, s3=settings)
        expected = counted(line for key, lines in bucket.items() if key.startswith("logs/") for line in lines)
        assert len(source.plan()) > 5
        assert djp.map_reduce(words, source, combine=djp.Sum(), engine=engine).to_dict() == expected

    def test_patterns(self, bucket: dict[str, list[str]], settings: S3Settings) -> None:
        def keys(pattern: str) -> list[str]:
            found = djp.TextFiles(f"s3://{bucket[''][0]}/{pattern}", s3=settings).plan()
            return [split.uri.split("/", 3)[3] for split in found]

        assert keys("logs/*.log") == ["logs/a.log"]
        assert keys("logs/*") == ["logs/a.log", "logs/b.log.gz"]
        assert set(keys("**/*.log")) == {"logs/a.log", "logs/deep/c.log", "other/d.log"}
        assert keys("logs/[ab].log*") == ["logs/a.log", "logs/b.log.gz"]
        assert keys("other/d.log") == ["other/d.log"]
        with pytest.raises(SourceError, match="nothing matches"):
            keys("logs/*.txt")

    def test_parquet(self, s3_server: SeaweedServer, s3_bucket: str, settings: S3Settings) -> None:
        body = io.BytesIO()
        pq.write_table(pa.table({"v": range(1000)}), body, row_group_size=100)
        s3_server.client().put_object(Bucket=s3_bucket, Key="a.parquet", Body=body.getvalue())
        source = djp.ParquetFiles(f"s3://{s3_bucket}/*.parquet", split_bytes=1, s3=settings)
        assert records_of(source) == [{"v": number} for number in range(1000)]

    @pytest.mark.parametrize("change", ["replaced", "deleted"])
    def test_one_that_changes(
        self, s3_server: SeaweedServer, bucket: dict[str, list[str]], settings: S3Settings, change: str
    ) -> None:
        name = bucket[""][0]
        (split,) = djp.TextFiles(f"s3://{name}/logs/a.log", s3=settings).plan()
        if change == "replaced":
            s3_server.client().put_object(Bucket=name, Key="logs/a.log", Body=b"x")
        else:
            s3_server.client().delete_object(Bucket=name, Key="logs/a.log")
        with pytest.raises(SourceError, match=r"changed|gone"):
            list(split.blocks("records"))

    def test_answers_that_break_off(
        self,
        s3_server: SeaweedServer,
        faulty_s3: FaultyS3,
        bucket: dict[str, list[str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("djp_dagster.claim_check.foreign._PAUSE_S", 0.001)
        settings = S3Settings(**s3_settings(s3_server, faulty_s3.endpoint_url))
        source = djp.TextFiles(f"s3://{bucket[''][0]}/logs/a.log", s3=settings)
        for fault in (CutResponse(500), Refuse(503, "SlowDown")):
            faulty_s3.on(fault, kind="GetObject", times=2)
            assert records_of(source) == "\n".join(bucket["logs/a.log"]).removesuffix("\n").split("\n")

    def test_refusals(self, settings: S3Settings) -> None:
        with pytest.raises(PayloadStoreRefusedError, match="NoSuchBucket"):
            djp.TextFiles("s3://no-such-bucket-anywhere/*", s3=settings).plan()
