"""Where the stream is looked for, how errors end a command, and what loading costs."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from djp_dagster import EventStream, Topic
from djp_dagster.cli import main
from tests.cli.conftest import SCRIPT, Djp, document

READING = [
    ["topics"],
    ["tail", "t"],
    ["lag"],
    ["groups"],
    ["groups", "show", "g"],
    ["groups", "delete", "g", "--yes"],
    ["seek", "g", "--to", "earliest"],
    ["dead-letters", "list"],
    ["dead-letters", "show", "g", "1"],
    ["dead-letters", "redrive", "g", "--all"],
    ["dead-letters", "discard", "g", "--all", "--yes"],
    ["publish", "t", "-"],
]


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_no_command_makes_a_stream_by_looking(djp: Djp, place: Path, words: list[str]) -> None:
    result = djp(*words, code=1)
    assert str(place) in result.stderr
    assert "--create" in result.stderr
    assert result.stdout == ""
    assert list(place.parent.iterdir()) == []


def test_an_empty_file_is_no_stream(djp: Djp, place: Path) -> None:
    place.touch()
    assert "there is no stream" in djp("topics", code=1).stderr
    assert place.stat().st_size == 0


def test_another_file_is_no_stream(djp: Djp, place: Path) -> None:
    place.write_text("something else, of some length")
    assert "is not a stream file" in djp("topics", code=1).stderr


def test_the_place_is_told_by_variable_and_by_default(
    djp: Djp, stream: EventStream, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.create_topic(Topic("here"))
    monkeypatch.setenv("DJP_STREAM_URL", f"sqlite:///{place}")
    assert document(djp("topics", "--json", stream=None))["topic"] == "here"
    monkeypatch.delenv("DJP_STREAM_URL")
    assert ".djp/stream.db" in djp("topics", stream=None, code=1).stderr
    djp("publish", "there", "--create", stream=None, given="1\n")
    assert document(djp("topics", "--json", stream=None))["topic"] == "there"


def test_only_the_default_folder_is_made(djp: Djp, tmp_path: Path) -> None:
    error = djp("publish", "t", "--create", stream=tmp_path / "no" / "folder.db", code=1, given="1\n").stderr
    assert "does not exist" in error
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://user:secret@host/database", "use sqlite"),
        ("://:secret@", "is no URL"),
        ("postgresql+pg8000://user:secret@host/database", "postgresql+psycopg"),
        ("postgresql+nothing://user:secret@host/database", "postgresql+psycopg"),
    ],
)
def test_what_is_no_stream_url_is_said_without_its_password(djp: Djp, url: str, said: str) -> None:
    error = djp("topics", stream=url, code=1).stderr
    assert said in error
    assert "secret" not in error


def test_errors_are_one_line_and_usage_errors_are_two(djp: Djp, stream: EventStream) -> None:
    error = djp("tail", "nothing", code=1).stderr
    assert error.startswith("Error: topic 'nothing' does not exist")
    assert error.count("\n") == 1
    assert "Usage:" in djp("tail", code=2).stderr
    assert "No such command" in djp("tails", code=2).stderr


def test_what_nobody_expected_is_not_hidden(djp: Djp, stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "topics", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        djp("topics")


def test_every_command_explains_itself() -> None:
    said = CliRunner().invoke(main, ["--help"]).output
    for name in main.list_commands(None):  # type: ignore[arg-type]
        assert name in said
        assert "..." not in next(line for line in said.splitlines() if line.split()[:1] == [name])
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


def test_the_script_says_its_version_and_loads_no_dagster() -> None:
    said = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.startswith("djp, version ")
    code = "import sys; from djp_dagster.cli import main\ntry: main(['topics'])\nexcept SystemExit: print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"dagster", "pandas", "pyarrow", "boto3", "rich"} & set(loaded.stdout.split())


@pytest.mark.parametrize(("target", "said"), [("", "--stream is empty"), ("sqlite://", "in memory")])
def test_a_stream_that_cannot_be_meant_is_refused(target: str, said: str) -> None:
    for command in (["topics"], ["publish", "t", "-", "--create"]):
        done = CliRunner().invoke(main, ["--stream", target, *command], input="{}\n")
        assert done.exit_code != 0
        assert said in done.output
