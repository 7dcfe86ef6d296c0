"""Text by ranges of bytes: each record once, whatever the ranges, the compression and the bytes."""

from __future__ import annotations

import bz2
import gzip
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import djp_dagster as djp
from djp_dagster.errors import BadRecordsError, InvalidSettingError, SourceError
from djp_dagster.mapreduce.sources import text as text_module
from tests.mapreduce.kit import blocks_of, counted, records_of, sums, text_of, words


def lines_of(path: Path, **settings: Any) -> list[str]:
    return records_of(djp.TextFiles(path, **settings))


@pytest.fixture(params=[1, 3, 64, 1 << 20])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", request.param)
    return int(request.param)


class TestSplits:
    @settings(max_examples=200)
    @given(
        lines=st.lists(st.text("ab\0é𝄞", max_size=12), max_size=12),
        ends=st.booleans(),
        split_bytes=st.integers(1, 40),
        delimiter=st.sampled_from(["\n", "\r\n", "\0", "ab", "é"]),
        block=st.integers(1, 9),
    )
    def test_every_record_is_in_one_split(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        lines: list[str],
        ends: bool,
        split_bytes: int,
        delimiter: str,
        block: int,
    ) -> None:
        text = delimiter.join(lines) + (delimiter if ends and lines else "")
        path = tmp_path_factory.mktemp("text") / "file"
        path.write_bytes(text.encode())
        expected = text.split(delimiter)
        if not expected[-1]:
            expected.pop()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_module, "BLOCK_BYTES", block)
            source = djp.TextFiles(path, delimiter=delimiter, split_bytes=split_bytes)
            found = records_of(source)
            raw = [one.whole for one in blocks_of(source, "bytes")]
        assert found == expected
        assert b"".join(raw) == text.encode()

    @pytest.mark.parametrize("split_bytes", [1, 7, 1000, "1MiB"])
    def test_real_text(self, tmp_path: Path, seed: random.Random, split_bytes: Any, small_blocks: int) -> None:
        lines = text_of(seed, 60)
        path = tmp_path / "file.txt"
        path.write_text("\n".join(lines), newline="")
        assert lines_of(path, split_bytes=split_bytes) == ("\n".join(lines).removesuffix("\n").split("\n"))

    def test_a_delimiter_that_overlaps_itself_is_not_split(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("a\n\n\nb\n\nc")
        source = djp.TextFiles(path, delimiter="\n\n", split_bytes=1)
        assert len(source.plan()) == 1
        assert records_of(source) == ["a", "\nb", "c"]

    def test_an_empty_file_has_no_records(self, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        (tmp_path / "line").write_text("\n")
        assert lines_of(tmp_path / "empty") == []
        assert lines_of(tmp_path / "line") == [""]

    def test_carriage_returns(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"a\r\n\r\nb\rc\r\nd\r")
        for split_bytes in range(1, 14):
            assert lines_of(path, split_bytes=split_bytes) == ["a", "", "b\rc", "d"]

    def test_counts(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"a\nb\nc")
        for form in ("records", "bytes"):
            blocks = blocks_of(djp.TextFiles(path, split_bytes=2), form)
            assert sum(block.count for block in blocks) == 3
            assert sum(block.size for block in blocks) == 5


class TestLongRecords:
    @pytest.mark.parametrize("block", [1, 3, 64, 100])
    @pytest.mark.parametrize("split_bytes", [1, 10, 57, 10_000])
    def test_are_bad_and_never_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split_bytes: int, block: int
    ) -> None:
        monkeypatch.setattr(text_module, "BLOCK_BYTES", block)
        path = tmp_path / "file"
        path.write_text("short\n" + "x" * 500 + "\n" + "a" * 100 + "\n" + "b" * 101 + "\nend\n" + "y" * 300)
        blocks = blocks_of(djp.TextFiles(path, split_bytes=split_bytes, max_record_bytes=100))
        assert [record for block in blocks for record in block.records] == ["short", "a" * 100, "end"]
        bad = [one for block in blocks for one in block.bad]
        assert [one.position for one in bad] == [6, 608, 714]
        assert all("more than 100 bytes" in one.reason for one in bad)
        assert all(len(one.raw) <= 100 + 2 * block for one in bad[:2])

    def test_the_limit_is_at_least_a_block(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidSettingError, match="max_record_bytes='1kB' must be at least 131072"):
            djp.TextFiles(tmp_path, max_record_bytes="1kB")


class TestEncoding:
    def test_what_is_no_utf8_is_bad(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes("ä\n".encode() + b"\xff\xfe\n" + "€\n".encode() + b"a\xc3")
        for split_bytes in (1, 5, 1000):
            blocks = blocks_of(djp.TextFiles(path, split_bytes=split_bytes))
            assert [record for block in blocks for record in block.records] == ["ä", "€"]
            bad = [one for block in blocks for one in block.bad]
            assert [(one.position, one.raw) for one in bad] == [(3, b"\xff\xfe"), (10, b"a\xc3")]
            assert all(one.source == str(path) for one in bad)

    def test_errors_and_encodings(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"\xe4\n")
        assert lines_of(path, errors="replace") == ["\ufffd"]
        assert lines_of(path, encoding="latin-1") == ["ä"]
        with pytest.raises(LookupError):
            djp.TextFiles(path, encoding="utf-99")

    def test_a_good_record_beside_a_bad_one_is_located(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"one\n\xff\ntwo\nthree\n")
        (block,) = blocks_of(djp.TextFiles(path))
        assert [block.locate(number) for number in range(3)] == [(0, b"one"), (6, b"two"), (10, b"three")]


PACKED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda data: bytes(pa.Codec("zstd").compress(data, asbytes=True)),
}


class TestCompressed:
    @pytest.mark.parametrize("suffix", PACKED)
    def test_several_members_are_one_stream(self, tmp_path: Path, seed: random.Random, suffix: str) -> None:
        lines = text_of(seed, 3000)
        raw = "\n".join(lines).encode()
        path = tmp_path / f"file.{suffix}"
        half = len(raw) // 2
        path.write_bytes(PACKED[suffix](raw[:half]) + PACKED[suffix](raw[half:]))
        source = djp.TextFiles(path, split_bytes=1000)
        assert len(source.plan()) == 1
        assert records_of(source) == raw.decode().removesuffix("\n").split("\n")

    @pytest.mark.parametrize("suffix", PACKED)
    @pytest.mark.parametrize("damage", ["cut", "other"])
    def test_a_damaged_one_is_named(self, tmp_path: Path, seed: random.Random, suffix: str, damage: str) -> None:
        whole = PACKED[suffix]("\n".join(text_of(seed, 3000)).encode())
        path = tmp_path / f"file.{suffix}"
        path.write_bytes(whole[:-40] if damage == "cut" else b"this is something else " * 50)
        with pytest.raises(SourceError, match="is not whole, or no") as caught:
            djp.map_reduce(words, djp.TextFiles(path), combine=djp.Sum())
        assert caught.value.facts["uri"] == str(path)

    def test_an_empty_one_has_no_records(self, tmp_path: Path) -> None:
        (tmp_path / "a.gz").write_bytes(gzip.compress(b""))
        assert lines_of(tmp_path / "a.gz") == []

    def test_as_told_against_the_name(self, tmp_path: Path) -> None:
        (tmp_path / "log").write_bytes(gzip.compress(b"a\nb"))
        (tmp_path / "plain.gz").write_bytes(b"a\nb")
        assert lines_of(tmp_path / "log", compression="gzip") == ["a", "b"]
        assert lines_of(tmp_path / "plain.gz", compression="none") == ["a", "b"]
        with pytest.raises(InvalidSettingError, match="compression='rar'"):
            lines_of(tmp_path / "log", compression="rar")


class TestFiles:
    def test_globs(self, tmp_path: Path) -> None:
        for name in ("b.log", "a.log", "c.txt", "deep/d.log"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        assert lines_of(tmp_path / "*.log") == ["a.log", "b.log"]
        assert lines_of(tmp_path / "**/*.log") == ["a.log", "b.log", "deep/d.log"]
        both = djp.TextFiles([tmp_path / "c.txt", tmp_path / "*.log", tmp_path / "a.log"])
        assert records_of(both) == ["c.txt", "a.log", "b.log"]
        assert records_of(djp.TextFiles(f"file://{tmp_path}/c.txt")) == ["c.txt"]

    def test_a_name_that_looks_like_a_pattern(self, tmp_path: Path) -> None:
        (tmp_path / "a[1].log").write_text("x")
        assert lines_of(tmp_path / "a[1].log") == ["x"]

    @pytest.mark.parametrize("name", ["nothing", "*.nothing"])
    def test_nothing_there(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(SourceError, match="nothing"):
            lines_of(tmp_path / name)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="is a folder"):
            lines_of(tmp_path)

    @pytest.mark.parametrize("url", ["ftp://host/file", "http://host/file"])
    def test_other_urls(self, url: str) -> None:
        with pytest.raises(InvalidSettingError, match="must be a path"):
            djp.TextFiles(url).plan()

    def test_no_paths(self) -> None:
        with pytest.raises(InvalidSettingError, match="at least one path"):
            djp.TextFiles([])

    @pytest.mark.parametrize("change", ["append", "replace", "remove"])
    def test_one_that_changes_after_the_plan(self, tmp_path: Path, change: str) -> None:
        path = tmp_path / "file"
        path.write_text("a\nb\n")
        (split,) = djp.TextFiles(path).plan()
        if change == "append":
            with path.open("a") as file:
                file.write("c\n")
        elif change == "replace":
            other = tmp_path / "other"
            other.write_text("x\ny\n")
            other.replace(path)
        else:
            path.unlink()
        with pytest.raises(SourceError, match=r"gone|changed") as caught:
            list(split.blocks("records"))
        assert caught.value.facts["uri"] == str(path)

    def test_one_that_changes_while_it_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_module, "BLOCK_BYTES", 4)
        path = tmp_path / "file"
        path.write_text("aaa\nbbb\nccc\n")
        (split,) = djp.TextFiles(path).plan()
        blocks = split.blocks("records")
        assert next(blocks).records == ["aaa"]
        os.truncate(path, 4)
        with pytest.raises(SourceError, match="changed"):
            list(blocks)


class TestBadRecords:
    def test_one_is_one_too_many_unless_told(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"good\n\xff\n")
        with pytest.raises(BadRecordsError, match=r"record at 5: .*utf-8") as caught:
            djp.map_reduce(words, djp.TextFiles(path), combine=djp.Sum())
        assert caught.value.facts["position"] == 5
        assert caught.value.facts["source"] == str(path)

    def test_a_part_of_them_is_kept_aside(self, tmp_path: Path, seed: random.Random) -> None:
        lines = [line for line in text_of(seed, 2000) if line]
        raw = [line.encode() for line in lines]
        for number in seed.sample(range(len(raw)), 20):
            raw[number] = b"\xff bad"
        path = tmp_path / "file"
        path.write_bytes(b"\n".join(raw))
        good = [one.decode() for one in raw if not one.startswith(b"\xff")]
        result = djp.map_reduce(words, djp.TextFiles(path, split_bytes=5000), **sums(max_bad_fraction=0.02))
        assert result.to_dict() == counted(good)
        assert result.report.bad_records == len(result.bad_records) == 20
        assert {one.raw for one in result.bad_records} == {b"\xff bad"}
        whole = path.read_bytes()
        assert all(whole[one.position :].startswith(b"\xff bad") for one in result.bad_records)
        with pytest.raises(BadRecordsError, match=r"20 of \d+ records"):
            djp.map_reduce(words, djp.TextFiles(path), **sums(max_bad_fraction=0.001))
