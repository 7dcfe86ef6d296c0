"""Fixtures: a payload store as a resource, an IO manager on it, and runs with it."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import djp_dagster as djp
from tests.orchestration.claim_check.kit import Runner, s3_store


@pytest.fixture
def folder(tmp_path: Path) -> djp.LocalPayloadStore:
    return djp.LocalPayloadStore(folder=str(tmp_path / "payloads"))


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.servers)])
def place(request: pytest.FixtureRequest, folder: djp.LocalPayloadStore) -> Any:
    """A payload store as a resource: in a folder, and on a real server."""
    if request.param == "folder":
        return folder
    return s3_store(request.getfixturevalue("s3_server"), request.getfixturevalue("s3_bucket"))


@pytest.fixture
def manager(folder: djp.LocalPayloadStore) -> djp.ClaimCheckIOManager:
    return djp.ClaimCheckIOManager(store=folder, threshold="1KiB")


@pytest.fixture
def run(instance: dg.DagsterInstance, manager: djp.ClaimCheckIOManager) -> Runner:
    return Runner(instance, manager)


@pytest.fixture
def run_there(instance: dg.DagsterInstance, place: Any) -> Runner:
    """Likewise, on each kind of store."""
    return Runner(instance, djp.ClaimCheckIOManager(store=place, threshold="1KiB"))
