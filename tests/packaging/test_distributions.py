"""What an index would be given: that it says what it is, holds what it should, and works where nothing else is."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import djp_dagster
from tests.conftest import REPOSITORY
from tests.packaging.kit import NEWEST, OLDEST, Built, new_environment
from tests.stranger import Project

_ABOUT = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
# Settings of editors and of git hooks: nothing is made, tested or checked with them.
_NOT_SHIPPED = {".editorconfig", ".pre-commit-config.yaml"}
_OF_THIS_TEST = ("PYTEST_", "COVERAGE_", "COV_")


def test_metadata(built: Built) -> None:
    said = built.metadata
    assert (said["Name"], said["Version"]) == ("djp-dagster", djp_dagster.__version__)
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload(decode=True) == (REPOSITORY / "README.md").read_bytes()
    assert said["License-Expression"] == "Apache-2.0"
    assert said.get_all("License-File") == ["LICENSE"]
    assert built.read("licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()
    # An index refuses both.
    assert not [one for one in said.get_all("Classifier", []) if one.startswith("License ::")]
    assert not [one for one in said.get_all("Requires-Dist", []) if "@" in one]


def test_the_pythons_it_names_are_those_it_takes(built: Built) -> None:
    language = "Programming Language :: Python :: 3."
    classifiers: list[str] = built.metadata.get_all("Classifier", [])
    named = [int(one.removeprefix(language)) for one in classifiers if one.startswith(language)]
    taken = SpecifierSet(built.metadata["Requires-Python"])
    assert named == [minor for minor in range(50) if taken.contains(f"3.{minor}.0")]
    assert [f"3.{min(named)}", f"3.{max(named)}"] == [OLDEST, NEWEST]


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    package = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "djp_dagster").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "djp_dagster/py.typed" in package
    about = {f"djp_dagster-{djp_dagster.__version__}.dist-info/{name}" for name in _ABOUT}
    assert built.in_wheel == package | about
    scripts = configparser.ConfigParser()
    scripts.read_string(built.read("entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"djp": "djp_dagster.cli:main"}


def test_the_sdist_holds_all_that_git_knows(built: Built) -> None:
    known, new = _files_of_git("--cached"), _files_of_git("--others", "--exclude-standard")
    assert known - built.in_sdist == _NOT_SHIPPED
    assert {_top(name) for name in built.in_sdist} - {_top(name) for name in known | new} == {"PKG-INFO"}
    assert not [name for name in built.in_sdist if "__pycache__" in name or name.endswith(".pyc")]


def _files_of_git(*which: str) -> set[str]:
    """Files of the checkout that are there."""
    listed = subprocess.run(
        ["git", "ls-files", *which], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    if listed.returncode:
        pytest.skip(f"no checkout of git to compare with: {listed.stderr.strip()}")
    return {name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()}


def _top(name: str) -> str:
    return name.partition("/")[0]


def test_the_sdist_can_be_tested(built: Built, tmp_path: Path) -> None:
    """All tests are found there, the package that they test is the one beside them, and the make targets are there."""
    unpacked = built.unpack(tmp_path)

    def there(*command: str) -> str:
        # Their coverage would count as that of files in a temporary folder.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THIS_TEST)}
        done = subprocess.run(
            command, cwd=unpacked, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    assert "-m pytest" in there("make", "--dry-run", "test", "lint", "docs")
    pytest_there = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q")
    found = there(*pytest_there, "--collect-only", "-m", "")
    for path in (unpacked / "tests").rglob("test_*.py"):
        assert f"{path.relative_to(unpacked)}::" in found
    where = "import djp_dagster; print(djp_dagster.__file__)"
    assert there(sys.executable, "-c", where).strip() == str(unpacked / "djp_dagster" / "__init__.py")
    assert " passed" in there(*pytest_there, "tests/test_errors.py", "tests/test_units.py")


@pytest.mark.daemon
def test_a_stranger_installs_the_wheel(built: Built, tmp_path: Path) -> None:
    """Into an environment of nothing else; and uses it, without this repository."""
    python = new_environment(tmp_path / "environment", Path(sys.executable), built.wheel)
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", python)
    where = project.run(str(python), "-c", "import djp_dagster; print(djp_dagster.__file__)")
    assert Path(where).is_relative_to(tmp_path / "environment")
    assert djp_dagster.__version__ in project.run("djp", "--version")
    project.is_used()
