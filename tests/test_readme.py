"""What the README shows, runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    import djp_dagster as djp

    with djp.open_stream("shop.db") as stream:
        mails = [record.data for partition in range(4) for record in stream.records("mails", partition)]
    assert mails == [{"user_id": "ada", "text": "Thank you for your first order"}]
