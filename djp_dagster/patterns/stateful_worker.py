"""Stateful worker: a job that keeps what it needs to know in a store of its own, built from the stream.

Two ways to keep state; both commit it together with the offsets and with what is emitted, so it is never ahead of, nor
behind, what was handled:

* ``@djp.consumer(stateful=True)`` and ``batch.state``: what a handler remembers for itself.
* `djp_dagster.Table`: the latest value of each key of a topic, for anybody to read: ``batch.table(...)`` in another
  consumer, an input of an asset (a DataFrame, or a dict), ``stream.view(...)`` anywhere else. Readers are eventually
  consistent: they see what its keeper has committed, and how far that is behind.

State lies in a SQLite file for each task, which is a cache: a task that moves to another host finds it in the newest
snapshot and the changelog.
"""

from typing import TYPE_CHECKING

import dagster as dg

from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.assets import consumer_asset
from djp_dagster.state.table import Table

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from djp_dagster.orchestration.assets import AssetOptions


def build_table_asset(table: Table, **options: "Unpack[AssetOptions]") -> dg.AssetsDefinition:
    """The table as an asset: runs of its sensor, or a worker, keep it up to date; *Materialize* makes it anew.

    *Materialize* applies what is pending, then folds the whole topic again, and commits what differs:
    ``corrected_keys`` is 0 unless something was wrong. Downstream assets load it as ``pd.DataFrame`` or ``dict``, as it
    is at that moment.

    Args:
        table: which.
        **options: as of `build_stream_asset`.

    Raises:
        InvalidSettingError: it is no table, or an option follows from it.

    Example:
        >>> import djp_dagster as djp
        >>> emails = djp.Table("user_emails", topic=djp.Topic("user_updates", key="user_id"), value="email")
        >>> build_table_asset(emails, group_name="shop").key.to_user_string()
        'user_emails'
    """
    if not isinstance(table, Table):
        raise InvalidSettingError(
            f"build_table_asset({table!r}) needs a Table; use build_stream_asset", setting="table", value=repr(table)
        )
    return consumer_asset(table, options=options)
