"""What the page on the claim check shows, runs."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "claim-check.md"


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_of_the_claim_check(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(codes) == 2
    exec(compile(codes[number], str(PAGE), "exec"), {"__name__": "example"})
