"""Where a stream lies that nobody has named: one place for publishers, the command line and Dagster."""

from pathlib import Path

import pytest

import djp_dagster as djp
from djp_dagster.errors import InvalidSettingError

T = djp.Topic("t")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DJP_STREAM_URL", raising=False)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


def publish_one() -> None:
    with djp.open_stream() as stream:
        stream.create_topic(T)
        stream.publish(T, [T.event(n=1)])


def counted_by_dagster() -> int:
    with djp.SqlEventStream().open() as stream:
        return sum(span.end for span in stream.log.spans(["t"]).values())


@pytest.mark.parametrize(
    ("variable", "value", "file"),
    [
        ("DAGSTER_HOME", "home", "home/djp/stream.db"),
        ("DJP_STREAM_URL", "sqlite:///elsewhere.db", "elsewhere.db"),
    ],
)
def test_publishers_and_dagster_find_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, file: str
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv(variable, value if "://" in value else str(tmp_path / value))
    publish_one()
    assert (tmp_path / file).exists()
    assert counted_by_dagster() == 1


def test_a_misspelt_home_is_refused_and_not_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "hmoe"))
    for opens in (publish_one, counted_by_dagster):
        with pytest.raises(InvalidSettingError, match="hmoe' names no folder"):
            opens()
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_it_says_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish_one()
    assert (tmp_path / ".djp" / "stream.db").exists()
    assert str(tmp_path / ".djp") in caplog.text
    assert counted_by_dagster() == 1
