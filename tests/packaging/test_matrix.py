"""The oldest and the newest Python, with the lowest and the newest of all that the wheel asks for."""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.packaging.kit import NEWEST, OLDEST, Built, find_python, new_environment
from tests.stranger import Project


@pytest.mark.soak
@pytest.mark.parametrize("resolution", ["lowest-direct", "highest"])
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_a_strangers_project(built: Built, tmp_path: Path, version: str, resolution: str) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version}: neither python{version} on the PATH, nor one of pyenv")
    # By name: what a wheel asks for is nothing that was asked for directly.
    wanted = [str(one) for one in built.requirements]
    made = new_environment(tmp_path / "environment", python, built.wheel, *wanted, resolution=resolution)
    (packages,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    assert packages.parent.name == f"python{version}"
    installed = {canonicalize_name(one.name): Version(one.version) for one in distributions(path=[str(packages)])}
    floors = {canonicalize_name(one.name): _floor(one) for one in built.requirements}
    print(*(f"{name} {installed[name]}" for name in sorted(floors)), sep=", ")
    above = {name for name, floor in floors.items() if installed[name] > floor}
    assert bool(above) == (resolution == "highest"), above
    (tmp_path / "project").mkdir()
    Project(tmp_path / "project", made).is_used()


def _floor(requirement: Requirement) -> Version:
    (lowest,) = [one.version for one in requirement.specifier if one.operator == ">="]
    return Version(lowest)
