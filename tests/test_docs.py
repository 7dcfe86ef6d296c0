"""What the pages show, runs."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = {
    "claim-check.md": 2,
    "event-buffering.md": 1,
    "kappa.md": 1,
    "map-reduce.md": 2,
    "stateful-worker.md": 2,
    "stateless-worker.md": 2,
}


@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page, count in EXAMPLES.items() for number in range(count)]
)
def test_the_examples_of(page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(codes) == EXAMPLES[page]
    exec(compile(codes[number], page, "exec"), {"__name__": "example"})
