"""Event buffering: wait for all parts of a key, from any number of topics, then handle them together, once.

`djp_dagster.join` says what to wait for; what waits is in the join's state, survives any restart, and expires by its
deadline, on idle inputs, too. Here is how Dagster shows it: as an asset whose metadata plot keys that are pending,
completed, expired, and parts that came late; and as a job by which a person looks at the buffer and expires keys.
``djp buffer`` is the same on the command line.
"""

from itertools import islice
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from djp_dagster.errors import InvalidSettingError
from djp_dagster.joining.declaration import Join
from djp_dagster.joining.inspection import BufferedKey, EventBuffer, request_expiry
from djp_dagster.orchestration.assets import consumer_asset
from djp_dagster.orchestration.tags import STREAM_KEY, consumer_key
from djp_dagster.processing.commands import carry_out
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.streams.records import from_micros

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from djp_dagster.orchestration.assets import AssetOptions

_MAX_ROWS = 200


class BufferConfig(dg.Config):
    """What to look at, or to expire."""

    group: str = Field(description="The join's group.")
    status: str = Field(default="pending", description="pending, completed, expired, failed, or all.")
    expire: list[str] = Field(default=[], description="Keys to expire now, as if their deadline had passed.")
    expire_all: bool = Field(default=False, description="All that are pending.")
    wait: str = Field(default="1min", description="How long to wait for a worker that holds the group.")


def build_join_assets(join: Join, **options: "Unpack[AssetOptions]") -> list[dg.AssetsDefinition]:
    """The join as an asset, after the assets of those that repartition its inputs, if any.

    Args:
        join: which.
        **options: of all of them, as of `build_stream_asset`; a description is the join's alone.

    Example:
        >>> import djp_dagster as djp
        >>> video, images = djp.Topic("video", key="product"), djp.Topic("images", key="id")
        >>> @djp.join(inputs={"video": video, "images": images}, key="product", repartition=True)
        ... def create(parts): ...
        >>> [asset.key.to_user_string() for asset in build_join_assets(create)]
        ['create-repartition-images', 'create']
    """
    shared: AssetOptions = {**options}
    shared.pop("description", None)
    return [
        *(consumer_asset(helper, options=shared) for helper in join.helpers),
        consumer_asset(join, options=options),
    ]


def build_buffer_job(*joins: Join, name: str = "buffer_job") -> dg.JobDefinition:
    """A job that shows the event buffer of a join, and expires keys: ``group``, ``status``, ``expire``, ``expire_all``.

    What it finds is an observation of the join's asset: a table of keys, the parts that wait, and when they expire.

    Args:
        *joins: whose buffers.
        name: the job's name.

    Raises:
        InvalidSettingError: no join.
    """
    if not joins:
        raise InvalidSettingError(f"job {name!r} needs joins", setting="joins", value=None)
    by_group = {join.group: join for join in joins}
    resources = {key for join in joins for key in join.resource_names}

    @dg.op(name=f"{name}_op", required_resource_keys={STREAM_KEY, *resources})
    def look_at_buffer(context: dg.OpExecutionContext, config: BufferConfig) -> None:
        join = by_group.get(config.group)
        if join is None:
            raise InvalidSettingError(
                f"group {config.group!r} is none of {sorted(by_group)}", setting="group", value=config.group
            )
        if config.expire or config.expire_all:
            _expire(context, join, config)
        _observe(context, join, config.status)

    @dg.job(
        name=name,
        executor_def=dg.in_process_executor,
        description="Shows what waits in an event buffer, and expires keys before their time.",
        config={"ops": {f"{name}_op": {"config": {"group": joins[0].group, "status": "pending", "expire": []}}}},
    )
    def job() -> None:
        look_at_buffer()

    return job


def _expire(context: dg.OpExecutionContext, join: Join, config: BufferConfig) -> None:
    resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
    stream, folder = resource.open(), resource.state_path()
    join.register(stream)
    with EventBuffer(stream, join.group, folder=folder) as buffer:
        waiting = {one.key for one in buffer if one.status == "pending"}
    wanted = [key for key in waiting if config.expire_all or str(key) in config.expire]
    requests = request_expiry(stream, join.group, wanted)
    resources = {key: getattr(context.resources, key) for key in join.resource_names}
    carry_out(stream, join, requests, resources=resources, state_folder=folder, wait=config.wait)
    context.log.info("expired %d keys", len(wanted))


def _observe(context: dg.OpExecutionContext, join: Join, status: str) -> None:
    resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
    stream = resource.open()
    join.register(stream)
    with EventBuffer(stream, join.group, folder=resource.state_path()) as buffer:
        found = [one for one in buffer if status in ("all", one.status)]
    found.sort(key=lambda one: (one.due_micros or one.since_micros or 0, str(one.key)))
    context.log_event(
        dg.AssetObservation(
            consumer_key(join),
            description=f"{len(found)} keys ({status})",
            metadata={"keys": len(found), "buffer": _table(found), "bytes": sum(one.bytes for one in found)},
        )
    )


def _table(found: list[BufferedKey]) -> dg.TableMetadataValue:
    columns = {"key": "string", "status": "string", "parts": "string", "due": "string", "since": "string"}
    rows = [
        dg.TableRecord(
            {
                "key": str(one.key),
                "status": one.status,
                "parts": ", ".join(f"{name} ({many})" for name, many in sorted(one.parts.items())),
                "due": _moment(one.due_micros),
                "since": _moment(one.since_micros),
            }
        )
        for one in islice(found, _MAX_ROWS)
    ]
    return dg.MetadataValue.table(rows, schema=dg.TableSchema([dg.TableColumn(*column) for column in columns.items()]))


def _moment(micros: int | None) -> str:
    return "" if micros is None else from_micros(micros).isoformat(timespec="seconds")
