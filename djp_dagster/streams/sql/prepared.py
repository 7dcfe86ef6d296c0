"""`Prepared`: a statement of SQLAlchemy Core, rendered once per dialect and then handed to the driver as text.

For the dozen statements that run for every batch. SQLAlchemy's execution costs several times what SQLite needs for
them, and they need none of what it buys: their parameters and columns are integers, texts and bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from djp_dagster.streams.sql.database import raw_connection

Parameters = Mapping[str, Any]


class _Rendered(NamedTuple):
    text: str
    names: tuple[str, ...] | None
    """The parameters in the order of their question marks; None where the driver takes them by name."""
    constants: Parameters


class Prepared:
    """One statement, without expanding parameters.

    Args:
        statement: the statement.
        columns: of an INSERT: the columns it fills.
    """

    def __init__(self, statement: sa.sql.ClauseElement, *, columns: Sequence[str] | None = None) -> None:
        self._statement, self._columns = statement, columns
        self._rendered: dict[str, _Rendered] = {}

    def _render(self, connection: Connection) -> _Rendered:
        dialect = connection.dialect
        rendered = self._rendered.get(dialect.name)
        if rendered is None:
            compiled = self._statement.compile(dialect=dialect, column_keys=self._columns)
            names = getattr(compiled, "positiontup", None)
            constants = {name: value for name, value in (compiled.params or {}).items() if value is not None}
            rendered = _Rendered(str(compiled), None if names is None else tuple(names), constants)
            self._rendered[dialect.name] = rendered
        return rendered

    def rows(self, connection: Connection, parameters: Parameters) -> list[Any]:
        """The rows, as plain tuples."""
        cursor = self._execute(connection, parameters)
        try:
            found: list[Any] = cursor.fetchall()
            return found
        finally:
            cursor.close()

    def first(self, connection: Connection, parameters: Parameters) -> Any:
        """The first row, as a plain tuple; None if there is none."""
        cursor = self._execute(connection, parameters)
        try:
            return cursor.fetchone()
        finally:
            cursor.close()

    def run(self, connection: Connection, parameters: Parameters) -> int:
        """How many rows the statement changed."""
        cursor = self._execute(connection, parameters)
        try:
            return int(cursor.rowcount)
        finally:
            cursor.close()

    def run_each(self, connection: Connection, parameters: Sequence[Parameters]) -> int:
        """How many rows the statement changed, over all sets of parameters."""
        if len(parameters) == 1:
            return self.run(connection, parameters[0])
        rendered = self._render(connection)
        cursor = raw_connection(connection).cursor()
        try:
            cursor.executemany(rendered.text, [_bound(rendered, one) for one in parameters])
            return int(cursor.rowcount)
        finally:
            cursor.close()

    def _execute(self, connection: Connection, parameters: Parameters) -> Any:
        rendered = self._render(connection)
        cursor = raw_connection(connection).cursor()
        try:
            cursor.execute(rendered.text, _bound(rendered, parameters))
        except BaseException:
            cursor.close()
            raise
        return cursor


def _bound(rendered: _Rendered, parameters: Parameters) -> Any:
    given = {**rendered.constants, **parameters} if rendered.constants else parameters
    return given if rendered.names is None else [given[name] for name in rendered.names]
