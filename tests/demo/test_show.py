"""The summary says where each pattern stands, fits on a terminal of 80 columns, and goes on saying what to click."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from rich.console import Console

import djp_dagster as djp
from definitions import defs, fraud, order_files, send_confirmations, submissions, user_updates
from demo.books import Books
from demo.figures import Figures
from demo.outbox import Mail, deliver, files, folder
from demo.patterns import CONSUMERS, PATTERNS, tour
from demo.show import Show
from demo.traffic import Publisher, Settings, Traffic
from tests.demo.test_books import handle, submitted

URL = "http://127.0.0.1:3000"
README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[djp.EventStream]:
    with djp.open_stream(tmp_path / "stream.db") as stream:
        Books(stream, folder())
        yield stream


def publish(stream: djp.EventStream, chunks: int) -> None:
    publisher = Publisher(stream, Traffic(Settings(rate=800, duplicates=0.05, poison=0.02)))
    for _ in range(chunks):
        publisher.publish_next()


def screen(stream: djp.EventStream) -> list[str]:
    """What is on a terminal of 80 columns and 24 lines after two looks."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    with Show(Figures(stream, folder()), URL, console) as show:
        show.refresh()
        before = console.file.tell()
        show.refresh(now=True)
        console.file.seek(before)
        shown = console.file.read()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "").splitlines()


def row(lines: list[str], name: str) -> str:
    (found,) = (line for line in lines if line.strip().startswith(name))
    return found


def test_the_screen_has_every_pattern_in_the_order_of_the_readme(stream: djp.EventStream, tmp_path: Path) -> None:
    in_readme = re.findall(r"^### (.+)$", README.read_text().partition("## The nine patterns")[2], re.MULTILINE)
    assert [pattern.name for pattern in PATTERNS] == in_readme
    lines = screen(stream)
    named = [pattern.name for line in lines for pattern in PATTERNS if line.strip().startswith(f"{pattern.name} ")]
    assert named == in_readme


def test_the_screen_fits(stream: djp.EventStream, tmp_path: Path) -> None:
    publish(stream, 24)
    handle(stream, tmp_path)
    lines = screen(stream)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    assert "…" not in "".join(lines)


def test_the_figures_are_those_of_the_stream(stream: djp.EventStream, tmp_path: Path) -> None:
    stream.publish(
        user_updates, [user_updates.event(user_id=f"u{n}", email=f"u{n}@x.org", version=1) for n in range(3)]
    )
    stream.publish(submissions, [submitted("p1"), submitted("p2", video="vhs")])
    handle(stream, tmp_path, *(consumer for consumer in CONSUMERS if consumer not in (fraud, send_confirmations)))
    publish(stream, 13)
    handle(stream, tmp_path, order_files)
    deliver("b1", [Mail("a@b.c", "order 1", ""), Mail("a@b.c", "order 2", "")])
    deliver("b1-confirmed", [Mail("a@b.c", "order 1", "")])
    lines = screen(stream)
    placed = sum(span.end for span in stream.log.spans(["orders"]).values())
    assert "products completed 1" in row(lines, "Event buffering")
    assert re.search(r"\b1 +parts of products 5$", row(lines, "DAG").rstrip())
    assert "batches, each a file 1" in row(lines, "Batching")
    assert "confirmations 1" in row(lines, "Stateless worker")
    assert "receipts 2" in row(lines, "Stateful worker")
    assert "claims 1" in row(lines, "Claim check")
    assert f" {placed:,} " in row(lines, "Stateless worker")  # its lag
    assert f"orders to add up {placed:,}" in row(lines, "MapReduce")
    assert "mails 3" in "".join(lines)


def test_mails_that_were_rotated_away_still_count(stream: djp.EventStream) -> None:
    figures = Figures(stream, folder())
    deliver("b1", [Mail("a@b.c", "order 1", "")])
    assert figures.made()["Stateful worker"] == {"receipts": 1}
    for file in files(folder()):
        file.unlink()
    deliver("b2", [Mail("a@b.c", "order 2", "")])
    assert figures.made()["Stateful worker"] == {"receipts": 2}


def test_the_screen_says_what_to_click(stream: djp.EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    (hint,) = (line for line in screen(stream) if line.startswith("Click"))
    assert hint.startswith(f"Click {URL}/assets/fraud (Streaming)")
    monkeypatch.setattr("demo.show._HINT_S", 1e-9)
    hints = {line for _ in range(40) for line in screen(stream) if line.startswith("Click")}
    assert len(hints) > 1


def test_without_a_terminal_it_is_a_line_now_and_then(
    stream: djp.EventStream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(stream, 12)
    handle(stream, tmp_path, fraud)
    figures = Figures(stream, folder())
    with Show(figures, URL) as show:
        show.refresh()
        show.refresh()
    (line,) = capsys.readouterr().out.splitlines()
    assert f" published {figures.published():,} (0/s), lag " in line
    for thing in ("products completed 0", "batches, each a file 0", "claims 1", "receipts 0", "dead letters "):
        assert thing in line


def test_an_outage_of_the_stream_is_said_and_waited_for(
    stream: djp.EventStream, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = Figures(stream, folder())
    with Show(figures, URL) as show:
        with monkeypatch.context() as outage:

            def away() -> int:
                raise djp.TransientError("nobody answers")

            outage.setattr(figures, "published", away)
            show.refresh(now=True)
        show.refresh(now=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "waiting for the stream: nobody answers"
    assert "published 0" in second


def test_every_link_of_the_tour_leads_somewhere() -> None:
    repository = defs.get_repository_def()
    text = tour(URL)
    assets = {key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()}
    linked = set(re.findall(rf"{URL}/assets/(\w+)", text))
    assert linked
    assert linked <= assets
    jobs = set(re.findall(rf"{URL}/locations/shop/jobs/(\w+)", text))
    assert jobs
    assert jobs <= set(repository.job_names)
    pages = set(re.findall(rf"{URL}/(\w[\w-]*)", text)) - {"assets", "locations"}
    assert pages == {"asset-groups", "runs", "automation"}
    assert re.findall(r"^  (\d)\. ", text, re.MULTILINE) == [*"123456789"]


def test_the_groups_of_the_shop_are_the_patterns() -> None:
    groups = {
        spec.group_name for asset in defs.assets or () if isinstance(asset, dg.AssetsDefinition) for spec in asset.specs
    }
    named = {re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", pattern.name).replace(" ", "_").lower() for pattern in PATTERNS}
    assert named <= groups
