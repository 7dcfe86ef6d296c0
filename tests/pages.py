"""The pages below docs/, taken apart: what is code in them, and which code belongs together."""

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
_FENCE = re.compile(r"^( *)(```+)(.*)$")


class Block(NamedTuple):
    """A fenced block, and the line at which its code begins."""

    page: Path
    line: int
    language: str
    title: str | None
    code: str


class PageError(Exception):
    """A page that cannot be taken apart."""


def pages(folder: Path = DOCS) -> list[Path]:
    return sorted(folder.rglob("*.md"))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    fence, info, begun, lines = "", "", 0, [""]
    for number, text in enumerate(page.read_text().splitlines(), 1):
        match = _FENCE.match(text)
        if fence:
            if match and match[2].startswith(fence) and not match[3].strip():
                language, _, rest = info.partition(" ")
                title = re.search(r'title="([^"]*)"', rest)
                code = textwrap.dedent("\n".join(lines)) + "\n"
                found.append(Block(page, begun + 1, language, title and title[1], code))
                fence = ""
            else:
                lines.append(text)
        elif match:
            fence, info, begun, lines = match[2], match[3].strip(), number, []
    if fence:
        raise PageError(f"{page.name}:{begun}: the block is never closed")
    return found


def programs(page: Path) -> list[list[Block]]:
    """The Python of a page: a block that imports the package begins a program, others go on with the last."""
    found: list[list[Block]] = []
    for block in blocks(page):
        if block.language != "python":
            continue
        if not found or re.search(r"^import djp_dagster|^from djp_dagster", block.code, re.MULTILINE):
            found.append([])
        found[-1].append(block)
    return found


def files(page: Path) -> Iterator[Block]:
    """The blocks that are files, by their titles."""
    return (block for block in blocks(page) if block.title is not None)


def run(program: list[Block], folder: Path) -> dict[str, Any]:
    """Run the blocks of a program in one namespace, in ``folder``, beside the files of their page; the namespace."""
    for block in files(program[0].page):
        assert block.title is not None
        (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.title).write_text(block.code)
    names: dict[str, Any] = {"__name__": "example"}
    stems = {path.stem for path in folder.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in stems if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        for block in program:
            # Lines are those of the page, so that a traceback names them.
            exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)
    finally:
        sys.path.remove(str(folder))
        _restore(stems, before)
    return names


def _restore(stems: set[str], before: dict[str, ModuleType]) -> None:
    for name in stems:
        sys.modules.pop(name, None)
    sys.modules.update(before)
