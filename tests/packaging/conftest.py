"""What is built once for all tests of it."""

from __future__ import annotations

import pytest

from tests.conftest import REPOSITORY
from tests.packaging.kit import Built, build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The distributions of this repository as it is."""
    return build(REPOSITORY, tmp_path_factory.mktemp("dist"))
