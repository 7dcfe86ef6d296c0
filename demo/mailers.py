"""Two ways to know an address, side by side: what the mailers of the shop told Dagster last."""

from typing import Any

import dagster as dg  # noqa: TID251

_COLUMNS = (
    dg.TableColumn("mailer", "string"),
    dg.TableColumn("address from", "string"),
    dg.TableColumn("as old as, seconds", "float"),
    dg.TableColumn("milliseconds an order", "float"),
    dg.TableColumn("calls", "int"),
    dg.TableColumn("failures", "int"),
    dg.TableColumn("mails", "int"),
)


def compared(instance: dg.DagsterInstance, mailers: dict[str, str]) -> dg.TableMetadataValue:
    """A row for each mailer that has run: how old its addresses were, how long it took, what failed.

    Args:
        instance: knows what was materialized.
        mailers: assets, and where each has its addresses from.
    """
    rows = []
    for asset, source in mailers.items():
        event = instance.get_latest_materialization_event(dg.AssetKey(asset))
        if event is None or event.asset_materialization is None:
            continue
        told = {name: value.value for name, value in event.asset_materialization.metadata.items()}
        rows.append(dg.TableRecord(_row(asset, source, told)))
    return dg.MetadataValue.table(rows, schema=dg.TableSchema(list(_COLUMNS)))


def _row(asset: str, source: str, told: dict[str, Any]) -> dict[str, Any]:
    per_order = 1000 * told["handler_seconds"] / max(told["events"], 1)
    values = (
        asset,
        source,
        float(told.get("address_staleness_seconds", 0.0)),
        round(per_order, 3),
        told.get("users_calls", 0),
        told.get("users_failures", 0),
        told.get("mails", 0),
    )
    return dict(zip((column.name for column in _COLUMNS), values, strict=True))
