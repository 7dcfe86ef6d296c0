"""Somebody who looks at the Dagster UI: where things are on its pages, and what its console complains about.

Written against the UI of Dagster 1.13. It is found by roles, texts, labels of icons and links, never by the names of
classes, which change with every release.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

SCREENSHOTS = "DJP_SCREENSHOTS"
"""Names a folder; each page a test visits is kept there as a picture."""

KNOWN_ERRORS: tuple[str, ...] = ()
"""Regular expressions of what Dagster's own pages write to the console as an error. None is known."""

_EDGE = re.compile(r"M\s*([\d.-]+)[,\s]([\d.-]+)\s*C.*?([\d.-]+)[,\s]([\d.-]+)\s*$")
_TOUCHES = 12.0
"""How far, in the graph's own units, an edge may end from the node it leads to: room for the arrow's head."""


@dataclass(frozen=True)
class _Node:
    name: str
    left: float
    top: float
    width: float
    height: float

    def touches(self, x: float, y: float) -> bool:
        return (
            self.left - _TOUCHES <= x <= self.left + self.width + _TOUCHES
            and self.top - _TOUCHES <= y <= self.top + self.height + _TOUCHES
        )

    @property
    def area(self) -> float:
        return self.width * self.height


class Visitor:
    """A page of the UI in a browser.

    Attributes:
        page: Playwright's page.
        errors: What the console called an error, and exceptions nobody caught, in order; known ones are left out.
    """

    def __init__(self, page: Page, url: str, folder: Path) -> None:
        self.page = page
        self.errors: list[str] = []
        self._url = url
        self._folder = folder
        page.on("console", lambda message: self._complain(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._complain(f"exception: {error}"))

    def open(self, path: str) -> None:
        """Go to a page of the UI."""
        self.page.goto(f"{self._url}{path}")

    def keep(self, name: str) -> None:
        """Keep a picture of the page, if somebody wants them."""
        if os.environ.get(SCREENSHOTS):
            folder = Path(os.environ[SCREENSHOTS])
            folder.mkdir(parents=True, exist_ok=True)
            self._settle()
            self.page.screenshot(path=folder / f"{name}.png")

    def evidence(self) -> str:
        """Save what is on the page and what its console said; the text names the files."""
        picture, console = self._folder / "page.png", self._folder / "console.txt"
        console.write_text("\n".join(self.errors) or "no errors")
        self.page.screenshot(path=picture, full_page=True)
        return f"at {self.page.url}\nscreenshot: {picture}\nconsole ({len(self.errors)} errors): {console}"

    def button(self, name: str) -> Locator:
        """The button with this text; the label of its icon, which comes first, is no matter."""
        return self.page.get_by_role("button", name=re.compile(rf"(^|\s){re.escape(name)}$"))

    def row(self, first_cell: str) -> Locator:
        """The row of a table whose first cell has this text."""
        cell = self.page.get_by_role("cell", name=first_cell, exact=True)
        return self.page.get_by_role("row").filter(has=cell).first

    def wait_for_lineage(self) -> None:
        """Wait until something is drawn: assets, or groups of them as one box."""
        self._graph.get_by_role("img", name=re.compile("^(asset|source_asset|unfold_more)$")).first.wait_for()

    def expand_groups(self) -> None:
        """Open the groups of the lineage that are drawn as one box, with the shortcut that the page names."""
        closed = self._graph.get_by_role("img", name="unfold_more")
        if closed.count():
            self.page.keyboard.press("Alt+KeyE")
            closed.first.wait_for(state="detached")

    def drawn_edges(self) -> set[tuple[str, str]]:
        """Which node leads to which, read from the lines of the picture: where each begins and ends.

        A node's name is the last part of its asset key.
        """
        nodes = self._drawn_nodes()
        edges = set()
        for line in self._graph.locator("svg > path, svg g > path").all():
            match = _EDGE.match(line.get_attribute("d") or "")
            if match:
                x1, y1, x2, y2 = map(float, match.groups())
                begins = min((node for node in nodes if node.touches(x1, y1)), key=lambda node: node.area, default=None)
                ends = min((node for node in nodes if node.touches(x2, y2)), key=lambda node: node.area, default=None)
                if begins and ends:
                    edges.add((begins.name, ends.name))
        return edges

    @property
    def _graph(self) -> Locator:
        return self.page.locator("[data-svg-viewport]")

    def _drawn_nodes(self) -> list[_Node]:
        nodes = []
        for box in self._graph.locator("foreignObject").filter(has=self.page.locator("[data-tooltip]")).all():
            name = box.locator("[data-tooltip]").first.get_attribute("data-tooltip") or ""
            place = [float(box.get_attribute(of) or "nan") for of in ("x", "y", "width", "height")]
            nodes.append(_Node(name, *place))
        return nodes

    def _settle(self) -> None:
        """Let what is being loaded come, so that the picture shows it; no test depends on that."""
        from playwright.sync_api import expect

        with suppress(AssertionError):
            expect(self.page.get_by_text(re.compile(r"^(Loading|Refreshing)"))).to_have_count(0, timeout=10_000)

    def _complain(self, text: str) -> None:
        if not any(re.search(known, text) for known in KNOWN_ERRORS):
            self.errors.append(text)
