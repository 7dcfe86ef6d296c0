"""The examples in the docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import djp_dagster

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(djp_dagster.__path__, "djp_dagster.")
    if not found.name.rpartition(".")[2].startswith("__")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0, f"{found.failed} of {found.attempted} examples of {name} fail; see the output"


def test_there_are_modules_with_examples() -> None:
    finder = doctest.DocTestFinder()
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 8
