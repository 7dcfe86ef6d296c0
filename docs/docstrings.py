"""How docstrings become pages: what griffe must be told about this package's way of writing them."""

import ast
import re
from typing import Any

import griffe

# As an admonition, ">>>" would be three quotations within each other; a section of examples is code.
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_LITERAL = re.compile(r"^\.\. code-block:: text\n\n((?:    .*\n|\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Examples as code, literal blocks as code, and the description of a resource's setting as its docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for everything that was found in the source."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _LITERAL.sub(_fenced, text)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Called for everything that is assigned."""
        settings = _settings_of(attr)
        if settings is None:
            return
        if attr.docstring is None and "description" in settings:
            attr.docstring = griffe.Docstring(settings["description"], parent=attr, parser="google")
        attr.value = repr(settings["default"]) if "default" in settings else None


def _fenced(found: re.Match[str]) -> str:
    lines = "\n".join(line[4:] for line in found[1].rstrip("\n").split("\n"))
    return f"```text\n{lines}\n```\n\n"


def _settings_of(attr: griffe.Attribute) -> dict[str, Any] | None:
    """The arguments of ``Field(default=..., description="...")``; None if it is not assigned one."""
    call = attr.value
    if not isinstance(call, griffe.ExprCall) or str(call.function).rpartition(".")[2] != "Field":
        return None
    found: dict[str, Any] = {}
    for given in call.arguments:
        if isinstance(given, griffe.ExprKeyword):
            try:
                found[given.name] = ast.literal_eval(str(given.value))
            except ValueError:
                found[given.name] = given.value
    return found
