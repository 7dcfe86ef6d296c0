"""Somebody who looks at the Dagster UI: where things are on its pages, and what its console complains about.

Written against the UI of Dagster 1.13. It is found by roles, texts, labels of icons and links, never by the names of
classes, which change with every release.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import FloatRect, Locator, Page

SCREENSHOTS = "DJP_SCREENSHOTS"
"""Names a folder; each page a test visits is kept there as a picture."""

KNOWN_ERRORS: tuple[str, ...] = ()
"""Regular expressions of what Dagster's own pages write to the console as an error. None is known."""

_EDGE = re.compile(r"M\s*([\d.-]+)[,\s]([\d.-]+)\s*C.*?([\d.-]+)[,\s]([\d.-]+)\s*$")
_RUN_PAGE = re.compile(r"/runs/([0-9a-f-]{36})")
_HAS_COLOUR = """canvas => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let coloured = 0;
  for (let at = 0; at < data.length; at += 4) {
    const [red, green, blue, opacity] = data.slice(at, at + 4);
    coloured += opacity > 128 && Math.max(red, green, blue) - Math.min(red, green, blue) > 100;
  }
  return coloured > 100;
}"""
# All in one question: the page draws anew between two.
_NAMES_AND_PLACES = """found => found.map(one => [
  one.querySelector("[data-tooltip]").getAttribute("data-tooltip"),
  ...["x", "y", "width", "height"].map(of => one.getAttribute(of))])"""
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

    def picture(self, name: str, *, around: Locator | None = None, margin: int = 24) -> None:
        """Keep one of the pictures of the documentation, if somebody wants them: cropped to ``around``, or the page.

        They lie in a folder of their own, from where ``make screenshots`` takes them.
        """
        if os.environ.get(SCREENSHOTS):
            folder = Path(os.environ[SCREENSHOTS]) / "images"
            folder.mkdir(parents=True, exist_ok=True)
            self._settle()
            clip = None if around is None else _frame(around, margin)
            self.page.screenshot(path=folder / f"{name}.png", clip=clip, animations="disabled")

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

    def type_config(self, job: str, config: str) -> None:
        """Open the Launchpad of a job, and type over what it is filled with; Dagster finds no fault with it."""
        self.open(f"/locations/shop/jobs/{job}/playground")
        self.page.get_by_text(f"{job}_op:").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(config)
        # What is launched is what the page has noted down, a moment after it is typed.
        self.page.wait_for_function(
            "typed => Object.values(localStorage).some(noted => noted.includes(JSON.stringify(typed)))", arg=config
        )
        self.page.get_by_text("No errors", exact=True).wait_for()

    def launch(self) -> str:
        """Press Launch Run; the run's id. The page is the run's then."""
        self.button("Launch Run").click()
        self.page.wait_for_url(_RUN_PAGE)
        found = _RUN_PAGE.search(self.page.url)
        assert found is not None
        return found[1]

    def switch(self) -> Locator:
        """The switch of the page of a sensor or schedule."""
        return self.row("Running").get_by_role("checkbox")

    @staticmethod
    def flip(switch: Locator) -> None:
        """Click the switch. The checkbox itself is invisible; its label is what a visitor sees."""
        switch.locator("xpath=..").click()

    def plot(self, label: str) -> Locator:
        """The canvas below this label."""
        return self.page.get_by_text(label, exact=True).locator("xpath=following::canvas[1]")

    def is_plotted(self, label: str) -> bool:
        """Whether there is a line in the plot: something coloured. Axes, grid and their labels are grey."""
        return bool(self.plot(label).evaluate(_HAS_COLOUR))

    def wait_for_lineage(self) -> None:
        """Wait until something is drawn: assets, or groups of them as one box."""
        self._graph.get_by_role("img", name=re.compile("^(asset|source_asset|unfold_more)$")).first.wait_for()

    def expand_group(self, name: str) -> None:
        """Open a group that is drawn as one box; the whole lineage is in sight again then."""
        box = self.nodes_of([name])
        box.get_by_role("img", name="unfold_more").click()
        box.get_by_role("img", name="unfold_more").wait_for(state="detached")
        self.page.wait_for_url(re.compile(rf"expanded=.*{name}"))
        self.page.reload()  # the page has gone to what was opened; its address knows which groups are open
        self.wait_for_lineage()

    def expand_groups(self) -> None:
        """Open the groups of the lineage that are drawn as one box, with the shortcut that the page names."""
        from playwright.sync_api import TimeoutError as TooLate

        closed = self._graph.get_by_role("img", name="unfold_more")
        for _ in range(3):  # a page that is drawn may not listen yet
            if closed.count():
                self.page.keyboard.press("Alt+KeyE")
                with suppress(TooLate):
                    closed.first.wait_for(state="detached", timeout=10_000)
        closed.first.wait_for(state="detached")

    @property
    def nodes(self) -> Locator:
        """What is drawn in the lineage: assets, or groups."""
        return self._graph.locator("foreignObject").filter(has=self.page.locator("[data-tooltip]"))

    def nodes_of(self, names: Iterable[str]) -> Locator:
        """What is drawn under these names."""
        return self.nodes.filter(has=self.page.locator(", ".join(f'[data-tooltip="{name}"]' for name in names)))

    def drawn_names(self) -> set[str]:
        """The names of what is drawn in the lineage."""
        return {node.name for node in self._drawn_nodes()}

    def drawn_edges(self) -> set[tuple[str, str]]:
        """Which node leads to which, read from the lines of the picture: where each begins and ends.

        A node's name is the last part of its asset key.
        """
        nodes = self._drawn_nodes()
        edges = set()
        lines = self._graph.locator("svg > path, svg g > path")
        for line in lines.evaluate_all("found => found.map(one => one.getAttribute('d') || '')"):
            if match := _EDGE.match(line):
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
        return [_Node(name, *map(float, place)) for name, *place in self.nodes.evaluate_all(_NAMES_AND_PLACES)]

    def _settle(self) -> None:
        """Let what is being loaded come, so that the picture shows it; no test depends on that."""
        from playwright.sync_api import expect

        with suppress(AssertionError):
            expect(self.page.get_by_text(re.compile(r"^(Loading|Refreshing)|fetching statuses"))).to_have_count(
                0, timeout=10_000
            )

    def _complain(self, text: str) -> None:
        if not any(re.search(known, text) for known in KNOWN_ERRORS):
            self.errors.append(text)


def _frame(around: Locator, margin: int) -> FloatRect:
    """What holds all of them, and a little more."""
    boxes = [box for one in around.all() if (box := one.bounding_box()) is not None]
    left, top = min(box["x"] for box in boxes) - margin, min(box["y"] for box in boxes) - margin
    right = max(box["x"] + box["width"] for box in boxes) + margin
    bottom = max(box["y"] + box["height"] for box in boxes) + margin
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}
