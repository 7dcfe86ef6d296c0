"""Which values a Dagster step stores and loads: of which partitions, in which form; and what is shown of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import dagster as dg

from djp_dagster.claim_check.claims import Claim
from djp_dagster.claim_check.serializers.kinds import name_of, without_none
from djp_dagster.claim_check.values import Inline, Kept
from djp_dagster.errors import InvalidSettingError

BY_PARTITION = "djp/by_partition"
MEDIA_TYPE = "djp/media_type"
THRESHOLD = "djp/threshold"
ALLOW_MISSING = "allow_missing_partitions"
"""As Dagster's own IO managers call it."""
_MOST_COLUMNS = 500
_HASH_DIGITS = 12
_MOST_NAMED = 5


def partitions_of(context: dg.InputContext | dg.OutputContext) -> list[str] | None:
    """The partitions a step stores or loads, in the order of their definition; None if there are no partitions.

    Raises:
        InvalidSettingError: the asset has partitions, and whoever loads it names none.
    """
    if not context.has_asset_key:
        return None
    if context.has_asset_partitions:
        # Not the context's own key or identifier: what has_partition_key and they say is about the run.
        return _ordered(list(context.asset_partition_keys), context)
    if isinstance(context, dg.InputContext) and _partitions_def(context) is not None:
        raise InvalidSettingError(
            f"asset {context.asset_key.to_user_string()!r} has partitions; name one: "
            "load_asset_value(..., partition_key=...)",
            setting="partition_key",
            value=None,
        )
    return None


def _ordered(keys: list[str], context: dg.InputContext | dg.OutputContext) -> list[str]:
    definition = _partitions_def(context)
    if len(keys) < 2 or definition is None or isinstance(definition, dg.TimeWindowPartitionsDefinition):
        return keys
    # A subset of any other definition is a set.
    instance = context.step_context.instance if _is_in_step(context) else None
    try:
        order = {
            key: number for number, key in enumerate(definition.get_partition_keys(dynamic_partitions_store=instance))
        }
    except dg.DagsterError:
        order = {}
    return sorted(keys, key=lambda key: (order.get(key, len(order)), key))


def _partitions_def(context: dg.InputContext | dg.OutputContext) -> dg.PartitionsDefinition[Any] | None:
    try:
        return context.asset_partitions_def
    except dg.DagsterInvariantViolationError:
        return None


def _is_in_step(context: dg.InputContext | dg.OutputContext) -> bool:
    try:
        return context.step_context is not None
    except dg.DagsterInvariantViolationError:
        return False


def step_of(context: dg.InputContext | dg.OutputContext) -> dg.StepExecutionContext | None:
    """The step, unless a person or a test stores or loads."""
    return context.step_context if _is_in_step(context) else None


def annotation_of(context: dg.InputContext | dg.OutputContext) -> Any:
    """What the value is annotated with, that of one output if an input collects several; Any if with nothing."""
    try:
        annotation = context.dagster_type.typing_type
    except dg.DagsterInvariantViolationError:
        return Any
    if isinstance(context, dg.InputContext) and _collects(context):
        inner = get_args(without_none(annotation)[0])
        return inner[0] if inner else Any
    return annotation


def _collects(context: dg.InputContext) -> bool:
    """Whether the input is a list of outputs, of which this is one: Dagster tells the type of the list."""
    if not _is_in_step(context) or not context.has_input_name:
        return False
    step = context.step_context.step
    if not step.has_step_input(context.name):
        return False  # a person asks a finished run for an output
    source = step.step_input_named(context.name).source
    return hasattr(source, "sources") and not hasattr(source, "source_to_load_from")


# Storing


def by_partition(context: dg.OutputContext, value: Any, keys: Sequence[str]) -> dict[str, Any]:
    """The value of each partition the step covers.

    Raises:
        InvalidSettingError: it covers several, and returns something else than their values by partition.
    """
    given = set(value) if isinstance(value, Mapping) else None
    if given == set(keys) and (len(keys) != 1 or _returns_several(context)):
        return {key: value[key] for key in keys}
    if len(keys) == 1:
        return {keys[0]: value}
    wrong = [] if given is None else sorted(str(key) for key in given ^ set(keys))
    what = f"a dict that differs from them in {wrong[:_MOST_NAMED]}" if wrong else name_of(type(value))
    raise InvalidSettingError(
        f"a run of {context.asset_key.to_user_string()!r} covers {len(keys)} partitions, {str(keys[0])!r} to "
        f"{str(keys[-1])!r}, and returns {what}; return a dict with a value for each of context.partition_keys, and no "
        "other, or run each partition by itself (no BackfillPolicy.single_run)",
        setting="output",
        value=name_of(type(value)),
    )


def _returns_several(context: dg.OutputContext) -> bool:
    """Whether the asset returns its values by partition even if there is only one."""
    told = told_by_partition(context)
    if told is not None:
        return told
    assets = _assets_def()
    policy = assets.backfill_policy if assets is not None else None
    return policy is not None and policy.max_partitions_per_run != 1


def told_by_partition(context: dg.InputContext | dg.OutputContext) -> bool | None:
    """What the metadata of an input or output says about values of one partition; None: nothing."""
    told = context.definition_metadata.get(BY_PARTITION)
    return None if told is None else bool(told)


def reads_in_a_partition(context: dg.InputContext) -> bool:
    """Whether whoever reads has partitions itself: one that has none reads one partition today, and two tomorrow."""
    assets = _assets_def()
    return assets.partitions_def is not None if assets is not None else context.has_partition_key


def _assets_def() -> dg.AssetsDefinition | None:
    try:
        found: dg.AssetsDefinition = dg.AssetExecutionContext.get().assets_def
    except dg.DagsterError:  # an op, a check, or no step at all
        return None
    return found


# What is shown


def metadata_of(kept: Kept) -> dict[str, dg.MetadataValue[Any]]:
    """Of a stored value: numbers ``djp/bytes, stored_bytes, seconds, mb_per_second``, and where and what it is."""
    payload = kept.payload
    size = kept.size
    shown: dict[str, dg.MetadataValue[Any]] = {
        "djp/kind": dg.MetadataValue.text(kept.kind),
        "djp/media_type": dg.MetadataValue.text(payload.media_type),
        "djp/sha256": dg.MetadataValue.text((payload.sha256 or "")[:_HASH_DIGITS]),
        "djp/inline": dg.MetadataValue.bool(isinstance(payload, Inline)),
        "djp/stored_bytes": dg.MetadataValue.int(kept.stored_bytes),
        "djp/seconds": dg.MetadataValue.float(round(kept.seconds, 6)),
    }
    if size is not None:
        shown["djp/bytes"] = dg.MetadataValue.int(size)
        shown["djp/mb_per_second"] = dg.MetadataValue.float(
            round(size / 1e6 / kept.seconds, 3) if kept.seconds else 0.0
        )
    if isinstance(payload, Claim):
        shown["djp/uri"] = dg.MetadataValue.text(payload.uri)
    if kept.stored is not None:
        shown["djp/deduplicated"] = dg.MetadataValue.bool(kept.stored.deduplicated)
    return shown | _table_metadata(kept)


def _table_metadata(kept: Kept) -> dict[str, dg.MetadataValue[Any]]:
    if kept.table is None:
        return {}
    shown: dict[str, dg.MetadataValue[Any]] = {"dagster/row_count": dg.MetadataValue.int(kept.table.rows)}
    if len(kept.table.columns) <= _MOST_COLUMNS:
        columns = [dg.TableColumn(name, kind) for name, kind in kept.table.columns]
        shown["dagster/column_schema"] = dg.MetadataValue.table_schema(dg.TableSchema(columns))
    return shown


def without(shown: Mapping[str, dg.MetadataValue[Any]], known: Iterable[str]) -> dict[str, dg.MetadataValue[Any]]:
    """Metadata under keys that the asset has not used itself: an IO manager's would win over its own."""
    taken = set(known)
    return {key: value for key, value in shown.items() if key not in taken}
