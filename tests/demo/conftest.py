"""Mails of the shop go where this test looks, not into the checkout."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the mails."""
    folder = tmp_path / "outbox"
    monkeypatch.setenv("SHOP_OUTBOX", str(folder))
    return folder
