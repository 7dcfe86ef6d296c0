"""What the pages show, runs; what they name is there; and the site has every page."""

import importlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import djp_dagster
from tests.pages import DOCS, REPOSITORY, Block, PageError, blocks, pages, programs, run

LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAMS = [program for page in pages() for program in programs(page)]
SHOWN = {"python", "sh", "console", "text", "yaml", "toml", "json", "sql", "ini", "dockerfile"}
"""``python`` is run, here; ``sh`` of the tutorial too, by `tests.test_tutorial`."""


def name_of(program: list[Block]) -> str:
    return f"{program[0].page.relative_to(DOCS)}:{program[0].line}"


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_the_example_of(program: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(program, tmp_path)


def test_every_pattern_has_an_example() -> None:
    shown = {program[0].page for program in PROGRAMS}
    assert set(pages(DOCS / "patterns")) <= shown
    assert len(PROGRAMS) >= 19


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_no_code_hides_under_another_name(page: Path) -> None:
    unknown = [f"line {block.line - 1}: {block.language!r}" for block in blocks(page) if block.language not in SHOWN]
    assert not unknown
    assert not _indented(page), "code that is indented is not run; fence it"


def _indented(page: Path) -> list[int]:
    """Lines that Markdown takes for code: indented by four, after an empty one, and outside of lists and fences."""
    found, fenced, listed, empty = [], False, False, True
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif line.strip() and not fenced:
            if line.startswith("    ") and empty and not listed:
                found.append(number)
            if not line.startswith(" "):
                listed = bool(re.match(r"[*\-+] |\d+\. |:::", line))
        empty = not line.strip()
    return found


def nav_of(config: dict[str, Any]) -> list[str]:
    """The pages that the navigation of the site names."""

    def walk(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return [page for one in inner for page in walk(one)]

    return walk(config["nav"])


def differences(named: list[str], there: set[str]) -> list[str]:
    """What is wrong between navigation and pages."""
    twice = [f"{page} is named {number} times" for page, number in Counter(named).items() if number > 1]
    missing = [f"{page} is named, and is not there" for page in sorted(set(named) - there)]
    return twice + missing + [f"{page} is not in the navigation" for page in sorted(there - set(named))]


def test_the_navigation_has_every_page_once() -> None:
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    assert differences(nav_of(config), {str(page.relative_to(DOCS)) for page in pages()}) == []


def test_the_site_fetches_nothing_from_elsewhere() -> None:
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript", "repo_url"} & set(config)
    assert "analytics" not in config.get("extra", {})
    # The theme would load Mermaid from another host for it.
    assert not [page for page in pages() for block in blocks(page) if block.language == "mermaid"]


@pytest.mark.parametrize(
    "page",
    [
        *pages(),
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    ],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_links_lead_to_files(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def reference() -> dict[str, list[str]]:
    """By page, what it shows: the dotted names after ``:::``."""
    shown = {
        page.name: re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE) for page in pages(DOCS / "reference")
    }
    assert shown
    return shown


def resolve(dotted: str) -> Any:
    """The module, or the thing in a module, of that name."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name)


def pages_of(name: str, shown: dict[str, list[str]]) -> list[str]:
    """The reference pages that show a public name: by itself, or with its whole module."""
    home = getattr(getattr(djp_dagster, name), "__module__", None)
    return [page for page, names in shown.items() for dotted in names if dotted in (f"djp_dagster.{name}", home)]


@pytest.mark.parametrize("name", djp_dagster.__all__)
def test_every_public_name_is_on_one_page_of_the_reference(name: str) -> None:
    assert len(pages_of(name, reference())) == 1


def test_the_reference_shows_what_is_there_and_each_thing_once() -> None:
    shown = [dotted for names in reference().values() for dotted in names]
    assert [dotted for dotted, number in Counter(shown).items() if number > 1] == []
    for dotted in shown:
        assert getattr(resolve(dotted), "__doc__", None), f"{dotted} has no docstring"


# That these tests can fail.


def test_an_example_that_is_wrong_fails_at_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nimport djp_dagster\none = 1\n```\n\nMore:\n\n```python\nassert one == 2\n```\n"
    )
    (program,) = programs(page)
    with pytest.raises(AssertionError) as caught:
        run(program, tmp_path)
    assert (caught.traceback[-1].lineno, caught.traceback[-1].path) == (10, page)


def test_a_program_begins_with_its_import_and_sees_the_files_of_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '```python title="one.py"\nimport djp_dagster\none = 1\n```\n\n```sh\nfalse\n```\n\n'
        "- in a list\n\n  ```python\n  from djp_dagster import errors\n"
        "  from one import one\n  two = one + one\n  ```\n"
    )
    first, second = programs(page)
    assert "two" not in run(first, tmp_path)
    assert run(second, tmp_path)["two"] == 2
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("one")


def test_blocks_that_are_not_closed_and_code_that_hides_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n* a list\n\n    of two paragraphs\n\nText\n\n    code()\n\n```python\nmore()\n")
    assert _indented(page) == [9]
    with pytest.raises(PageError, match=r"page.md:11"):
        blocks(page)


def test_a_page_outside_the_navigation_and_an_entry_without_page_are_found() -> None:
    named = nav_of({"nav": ["index.md", {"More": ["a.md", {"Deep": "b.md"}, "a.md"]}]})
    assert differences(named, {"index.md", "a.md", "c.md"}) == [
        "a.md is named 2 times",
        "b.md is named, and is not there",
        "c.md is not in the navigation",
    ]


def test_a_name_on_no_page_or_on_two_is_found() -> None:
    assert pages_of("DjpError", {"errors.md": ["djp_dagster.errors"], "more.md": ["djp_dagster.DjpError"]}) == [
        "errors.md",
        "more.md",
    ]
    assert pages_of("Topic", {"stream.md": ["djp_dagster.Event"]}) == []
