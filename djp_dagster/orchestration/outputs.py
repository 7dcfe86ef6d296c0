"""The IO manager of stream assets: storing does nothing, for the commit has done it; loading gives `BatchOutputs`."""

from typing import Any, get_args, get_origin

import dagster as dg

from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.step import stream_of
from djp_dagster.orchestration.tags import STREAM_KEY
from djp_dagster.processing.outputs import BatchOutputs


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
        wanted = context.dagster_type.typing_type
        as_arrow = False
        if get_origin(wanted) is BatchOutputs:
            as_arrow = getattr(get_args(wanted)[0], "__module__", "").startswith("pyarrow")
        elif wanted not in (BatchOutputs, Any, object):
            raise InvalidSettingError(
                f"input {context.name!r} of {context.step_context.step.key!r} is annotated {wanted!r}, and "
                f"{self._group!r} has one output per batch; annotate it BatchOutputs, and choose: .latest(), "
                ".since(reader), or iterate over all",
                setting=context.name,
                value=str(wanted),
            )
        step = context.step_context
        return BatchOutputs(
            stream_of(context.resources),
            self._group,
            as_arrow=as_arrow,
            proposer=f"{step.run_id}/{step.step.key}",
            has_succeeded=lambda proposer: _has_succeeded(step.instance, proposer),
        )


def _has_succeeded(instance: dg.DagsterInstance, proposer: str) -> bool:
    """Whether the step did. A run that nobody remembers did not, as far as anybody can tell."""
    run_id, _, step_key = proposer.partition("/")
    if instance.get_run_by_id(run_id) is None:
        return False
    stats = instance.get_run_step_stats(run_id, step_keys=[step_key])
    return any(step.status is not None and step.status.value == "SUCCESS" for step in stats)


def io_manager_of(group: str) -> dg.IOManagerDefinition:
    """The IO manager of the asset of a consumer group."""

    @dg.io_manager(required_resource_keys={STREAM_KEY}, description=f"The batch outputs of {group}.")
    def batch_outputs(context: dg.InitResourceContext) -> BatchOutputsIOManager:
        return BatchOutputsIOManager(group)

    return batch_outputs
