"""The generated page of the docs says what a crash leaves behind today."""

import pytest

from tests.crash.table import DOCUMENT, table

pytestmark = pytest.mark.crash


def test_the_documented_crash_table_is_true() -> None:
    assert DOCUMENT.read_text() == table(), "run python -m tests.crash.table and read what changed"
