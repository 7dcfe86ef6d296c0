"""A stranger's first project works where this repository is installed."""

import sys
from pathlib import Path

import pytest

from tests.stranger import PROJECT, Project


@pytest.mark.daemon
def test_fifteen_lines_are_a_project(tmp_path: Path) -> None:
    assert len([line for line in PROJECT.splitlines() if line]) <= 15
    Project(tmp_path, Path(sys.executable)).is_used()
