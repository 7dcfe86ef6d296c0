"""The IO manager of stream assets: storing does nothing, for the commit has done it; loading gives `BatchOutputs`."""

from typing import Any, get_origin

import dagster as dg

from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.step import stream_of
from djp_dagster.orchestration.tags import STREAM_KEY
from djp_dagster.processing.outputs import BatchOutputs
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.state.table import Table


class BatchOutputsIOManager(dg.IOManager):
    """Gives readers of a stream asset the outputs of its batches, resolved from the stream.

    Args:
        group: the consumer group whose outputs they are.
    """

    def __init__(self, group: str) -> None:
        self._group = group

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Store nothing: outputs became visible with their batches."""

    def load_input(self, context: dg.InputContext) -> BatchOutputs[Any]:
        """The outputs, in the form the input is annotated with.

        Raises:
            InvalidSettingError: the input is annotated with something else.
        """
        wanted: Any = context.dagster_type.typing_type
        if wanted in (Any, object):
            wanted = BatchOutputs
        if not (isinstance(wanted, type) and issubclass(wanted, BatchOutputs)):
            raise InvalidSettingError(
                f"input {context.name!r} is annotated {wanted!r}, and {self._group!r} has one output per batch; "
                "annotate it BatchOutputs, and choose: .latest(), .since(reader), or iterate over all",
                setting=context.name,
                value=str(wanted),
            )
        item_type = getattr(wanted, "item_type", None)
        outputs: BatchOutputs[Any] = wanted(
            stream_of(context.resources),
            self._group,
            as_arrow=getattr(item_type, "__module__", "").startswith("pyarrow"),
            **_proposer(context),
        )
        return outputs


class TableIOManager(dg.IOManager):
    """Gives readers of a table's asset the table as it is when they load it.

    Args:
        table: which.
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Store nothing: the table became visible with its batches."""

    def load_input(self, context: dg.InputContext) -> Any:
        """The table as a DataFrame; or a dict, if the input is annotated so.

        Raises:
            InvalidSettingError: the input is annotated with something else.
        """
        wanted: Any = context.dagster_type.typing_type
        resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
        with resource.open().view(self._table, folder=resource.state_path()) as view:
            if wanted is dict or get_origin(wanted) is dict:
                with view.pinned():
                    return dict(view.items())
            if wanted in (Any, object) or getattr(wanted, "__name__", "") == "DataFrame":
                return view.to_pandas()
        raise InvalidSettingError(
            f"input {context.name!r} is annotated {wanted!r}; table {self._table.group!r} is loaded as pd.DataFrame or "
            "dict; for look-ups of single keys use event_stream.open().view(table)",
            setting=context.name,
            value=str(wanted),
        )


def _proposer(context: dg.InputContext) -> dict[str, Any]:
    """Who asks: a step, if there is one; nobody if a person loads the value."""
    try:
        step = context.step_context
    except dg.DagsterInvariantViolationError:
        return {}
    return {
        "proposer": f"{step.run_id}/{step.step.key}",
        "has_succeeded": lambda proposer: _has_succeeded(step.instance, proposer),
    }


def _has_succeeded(instance: dg.DagsterInstance, proposer: str) -> bool:
    """Whether the step did. A run that nobody remembers did not, as far as anybody can tell."""
    run_id, _, step_key = proposer.partition("/")
    if instance.get_run_by_id(run_id) is None:
        return False
    stats = instance.get_run_step_stats(run_id, step_keys=[step_key])
    return any(step.status is not None and step.status.value == "SUCCESS" for step in stats)


def table_io_manager_of(table: Table) -> dg.IOManagerDefinition:
    """The IO manager of the asset of a table."""

    @dg.io_manager(required_resource_keys={STREAM_KEY}, description=f"The table {table.group}.")
    def table_as_it_is(context: dg.InitResourceContext) -> TableIOManager:
        return TableIOManager(table)

    return table_as_it_is


def io_manager_of(group: str) -> dg.IOManagerDefinition:
    """The IO manager of the asset of a consumer group."""

    @dg.io_manager(required_resource_keys={STREAM_KEY}, description=f"The batch outputs of {group}.")
    def batch_outputs(context: dg.InitResourceContext) -> BatchOutputsIOManager:
        return BatchOutputsIOManager(group)

    return batch_outputs
