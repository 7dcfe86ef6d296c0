"""Where an asset's code is: the handler or mapper it was made of, not the builder that made it."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

CODE_REFERENCES_KEY = "dagster/code_references"


def code_link(function: Callable[..., Any]) -> Mapping[str, dg.MetadataValue]:
    """Metadata that names file and line of a function, which the UI opens; nothing for what has no source.

    ``dg.link_code_references_to_git`` turns it into a link to a repository, as it does with those of plain assets.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or not code.co_filename or code.co_filename.startswith("<"):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # nobody can act on the word
        path = str(Path(code.co_filename).absolute())
        place = dg.LocalFileCodeReference(file_path=path, line_number=code.co_firstlineno)
        return {CODE_REFERENCES_KEY: dg.CodeReferencesMetadataValue(code_references=[place])}
