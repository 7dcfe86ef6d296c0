"""What the README shows, runs; what it says of figures and files, is there."""

import re
from pathlib import Path

import dagster as dg
import pytest

README = Path(__file__).parents[1] / "README.md"
PATTERNS = (
    "Streaming",
    "Batching",
    "Kappa",
    "DAG",
    "Event buffering",
    "Stateless worker",
    "Claim check",
    "Stateful worker",
    "MapReduce",
)


def test_every_block_runs_and_every_pattern_loads_in_dagster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert tuple(headings) == PATTERNS
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == len(PATTERNS)
    names: dict[str, object] = {"__name__": "readme"}
    for heading, block in zip(headings, blocks, strict=True):
        exec(compile(block, f"README.md: {heading}", "exec"), names)
    loaded = [value for value in names.values() if isinstance(value, dg.Definitions)]
    assert len(loaded) == len(PATTERNS)
    for definitions in loaded:
        given = definitions.resources or {}
        dg.Definitions.validate_loadable(
            definitions if "event_stream" in given else dg.Definitions.merge(definitions, stream_of(loaded[0]))
        )


def stream_of(definitions: dg.Definitions) -> dg.Definitions:
    """The stream that the first block brings, for all of them."""
    assert definitions.resources is not None
    return dg.Definitions(resources={"event_stream": definitions.resources["event_stream"]})


def test_its_links_lead_to_files_and_headings() -> None:
    text = README.read_text()
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 20
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("http"):
            assert (README.parent / target).exists(), target


def test_the_figures_are_those_of_the_benchmarks() -> None:
    """Each figure that names its command is a figure of benchmarks/README.md."""
    measured = (README.parent / "benchmarks" / "README.md").read_text()
    for figure in (
        "281 k/s",
        "2.8/s",
        "82 ms",
        "499 ms",
        "1.05x",
        "0.86x",
        "7.6x",
        "p50 7.5 ms, p99 24 ms",
        "max 11.8 s",
    ):
        assert figure in README.read_text()
        assert figure in measured
