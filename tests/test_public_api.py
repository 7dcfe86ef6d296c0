"""What importing costs, and what is public."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import djp_dagster

PACKAGE = Path(djp_dagster.__file__).parent
DAGSTER_SIDE = ("orchestration", "patterns", "resources")
HEAVY = ("dagster", "dagster_aws", "cloudpickle", "distributed", "pandas", "pyarrow", "boto3", "botocore", "numpy")
LOADED = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages a fresh process has loaded after importing the modules."""
    done = subprocess.run([sys.executable, "-c", LOADED, *modules], check=True, capture_output=True, timeout=60)
    return set(json.loads(done.stdout))


def core_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in DAGSTER_SIDE]


def test_importing_the_package_loads_next_to_nothing() -> None:
    loaded = loaded_by("djp_dagster")
    assert not loaded & {*HEAVY, "sqlalchemy", "psycopg", "msgspec", "click", "rich", "yaml"}


def test_the_core_loads_no_backend_and_no_dagster() -> None:
    loaded = loaded_by(
        "djp_dagster.streams.stream",
        "djp_dagster.streams.sql.coordinator",
        "djp_dagster.processing.worker",
        "djp_dagster.processing.redrive",
        "djp_dagster.claim_check.serializers",
        "djp_dagster.mapreduce.running",
        "djp_dagster.mapreduce.engines.worker",
        "djp_dagster.mapreduce.sources.text",
        "djp_dagster.testing",
    )
    assert not loaded & {*HEAVY, "psycopg", "click", "rich"}


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_core_modules_never_import_dagster(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] not in ("dagster", "dagster_aws"), f"line {node.lineno}"
            # What touches Dagster is above the core; only the public face names it, lazily.
            if path.name != "__init__.py":
                above = ("djp_dagster.orchestration", "djp_dagster.patterns", "djp_dagster.resources")
                assert not name.startswith(above), f"line {node.lineno}"


@pytest.mark.parametrize("name", djp_dagster.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(djp_dagster, name) is getattr(djp_dagster, name)


def test_all_is_sorted_complete_and_listed() -> None:
    assert sorted(set(djp_dagster.__all__)) == sorted(djp_dagster.__all__)
    homes = set(djp_dagster._HOMES) - {"errors", "testing"}
    assert homes | {"__version__"} == set(djp_dagster.__all__)
    assert set(djp_dagster.__all__) <= set(dir(djp_dagster))


def test_modules_are_attributes_on_first_use() -> None:
    assert djp_dagster.errors.DjpError is djp_dagster.DjpError
    assert djp_dagster.testing.memory_stream


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = djp_dagster.nothing
    assert not hasattr(djp_dagster, "patterns_of_nothing")
