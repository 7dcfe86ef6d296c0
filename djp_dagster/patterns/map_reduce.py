"""MapReduce: page counts over web logs and the like; map, combine, shuffle by key hash, reduce, as one asset.

==============================  ====================================================================================
`map_reduce_asset`              the results of a job as the value of an asset: a table, through the IO manager
`build_merged_asset`            the results of all partitions of such an asset, without reading their input again
`map_reduce_op`                 the same as an op
`djp_dagster.map_reduce`        the same as a plain call, without Dagster
==============================  ====================================================================================

A run is one step, whatever the number of tasks: they are shared out by an engine, in this process, to all processors,
or to a Dask cluster. Dagster is told once in ten seconds at most how far they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import dagster as dg

from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.errors import InvalidSettingError
from djp_dagster.mapreduce.combining import CombineFn
from djp_dagster.mapreduce.job import Mapper, MapReduce, as_job
from djp_dagster.mapreduce.merging import COLUMNS, accumulators, keeping_accumulators, merge_accumulators
from djp_dagster.mapreduce.results import MapReduceResult
from djp_dagster.orchestration.code_links import code_link
from djp_dagster.orchestration.map_reduce import (
    AnySource,
    EngineChoice,
    report_metadata,
    resources_of,
    run_in_step,
    topics_of,
)

Output = Literal["pandas", "arrow", "accumulators"]


def map_reduce_asset(
    *,
    source: AnySource,
    columns: Sequence[str] = ("key", "value"),
    output: Output = "pandas",
    engine: EngineChoice = "auto",
    key: "dg.CoercibleToAssetKey | None" = None,
    work: PayloadStore | str | None = None,
    asset: Mapping[str, Any] | None = None,
    **settings: Any,
) -> "Callable[[Mapper | MapReduce], dg.AssetsDefinition]":
    """The decorated mapper as an asset: each materialization runs the job, and its value is the table of results.

    Args:
        source: what to read; of an asset with partitions, a function from the partition's key to that.
        columns: the names of the columns; see `MapReduceResult.batches`.
        output: ``"pandas"``, a DataFrame; ``"arrow"``, a reader of Arrow batches, for results larger than memory (the
            IO manager must take one, as `ClaimCheckIOManager` does); ``"accumulators"``, what `build_merged_asset`
            merges.
        engine: as for `map_reduce`; an engine of one's own as a function that makes it.
        key: of the asset; the mapper's name unless given.
        work: where tasks hand things to each other, and where a run that failed is gone on with. The payload store of
            the code location unless given: a folder under DAGSTER_HOME, or the bucket ``DJP_S3_BUCKET``.
        asset: what else ``dg.asset`` takes, such as ``partitions_def, group_name, deps, owners, tags``. An asset over a
            topic is downstream of it without that.
        **settings: of `MapReduce`, such as ``combine``.

    Raises:
        InvalidSettingError: of the job, or settings that contradict each other.

    Example:
        >>> import djp_dagster as djp
        >>> @djp.map_reduce_asset(source=djp.TextFiles("access.log"), combine=djp.Sum(), columns=("page", "views"))
        ... def page_views(line: str):
        ...     yield line.split(" ", 7)[6], 1
        >>> page_views.key.to_user_string()
        'page_views'
    """

    def decorate(mapper: "Mapper | MapReduce") -> dg.AssetsDefinition:
        job = as_job(mapper, settings)
        if output not in ("pandas", "arrow", "accumulators"):
            raise InvalidSettingError(
                f"output={output!r} must be 'pandas', 'arrow' or 'accumulators'", setting="output", value=output
            )
        wanted = keeping_accumulators(job) if output == "accumulators" else job
        names = COLUMNS if output == "accumulators" else tuple(columns)
        options: dict[str, Any] = {
            "key": key or job.name,
            "description": job.__doc__,
            "kinds": {"mapreduce"},
            "code_version": job.code_version,
            **(asset or {}),
        }
        options["metadata"] = {**code_link(job.mapper), **(options.get("metadata") or {})}
        keys = resources_of(source) | set(options.pop("required_resource_keys", ()))
        options["deps"] = [*topics_of(source), *options.get("deps", ())]

        def run_map_reduce(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
            result = run_in_step(context, wanted, source, engine=engine, work=work)
            metadata = report_metadata(result, names)
            return dg.MaterializeResult(value=_value(result, output, names), metadata=metadata)

        made: dg.AssetsDefinition = dg.asset(required_resource_keys=keys, **options)(run_map_reduce)
        return made

    return decorate


def map_reduce_op(
    mapper: "Mapper | MapReduce",
    *,
    source: AnySource,
    columns: Sequence[str] = ("key", "value"),
    engine: EngineChoice = "auto",
    work: PayloadStore | str | None = None,
    name: str | None = None,
    **settings: Any,
) -> dg.OpDefinition:
    """The same as an op, whose output is the table of results as a DataFrame.

    Args:
        mapper: the mapper, or a `MapReduce`.
        source: as for `map_reduce_asset`, as are the next three.
        columns: the names of the columns.
        engine: who does it.
        work: where tasks hand things to each other.
        name: of the op; the mapper's name unless given.
        **settings: of `MapReduce`.
    """
    job = as_job(mapper, settings)

    @dg.op(
        name=name or job.name,
        description=job.__doc__,
        required_resource_keys=resources_of(source),
        tags={"kind": "mapreduce"},
    )
    def run_map_reduce(context: dg.OpExecutionContext) -> Any:
        result = run_in_step(context, job, source, engine=engine, work=work)
        context.add_output_metadata(report_metadata(result, columns))
        return _value(result, "pandas", columns)

    return run_map_reduce


def build_merged_asset(
    parts: dg.AssetsDefinition,
    *,
    key: "dg.CoercibleToAssetKey",
    combine: CombineFn[Any, Any, Any],
    columns: Sequence[str] = ("key", "value"),
    asset: Mapping[str, Any] | None = None,
) -> dg.AssetsDefinition:
    """An asset of the results over all partitions of another, made of their accumulators: no input is read again.

    Args:
        parts: a `map_reduce_asset` with partitions and ``output="accumulators"``.
        key: of the asset.
        combine: the one of ``parts``.
        columns: as for `map_reduce_asset`.
        asset: what else ``dg.asset`` takes.

    Example:
        >>> import dagster as dg, djp_dagster as djp
        >>> days = dg.DailyPartitionsDefinition("2026-11-01")
        >>> @djp.map_reduce_asset(
        ...     source=lambda day: djp.TextFiles(f"logs/{day}/*.gz"),
        ...     combine=djp.Mean(), output="accumulators", asset={"partitions_def": days},
        ... )
        ... def daily_seconds(line: str):
        ...     page, seconds = line.split()
        ...     yield page, float(seconds)
        >>> build_merged_asset(daily_seconds, key="seconds", combine=djp.Mean()).key.to_user_string()
        'seconds'
    """
    mapping = dg.AllPartitionMapping()
    inputs = {"parts": dg.AssetIn(parts.key, partition_mapping=mapping, metadata={"allow_missing_partitions": True})}

    def merge(context: dg.AssetExecutionContext, parts: Any) -> dg.MaterializeResult[Any]:
        tables = list(parts.items()) if isinstance(parts, Mapping) else [("all", parts)]
        with merge_accumulators(tables, combine) as result:
            shown = {**report_metadata(result, columns), "partitions": len(tables)}
            return dg.MaterializeResult(value=result.to_pandas(columns), metadata=shown)

    made: dg.AssetsDefinition = dg.asset(key=key, ins=inputs, kinds={"mapreduce"}, **(asset or {}))(merge)
    return made


def _value(result: MapReduceResult, output: Output, columns: Sequence[str]) -> Any:
    """The value of the asset. Only a table in memory is read by now: the others are read while they are stored."""
    if output == "pandas":
        frame = result.to_pandas(columns)
        result.close()
        return frame
    return accumulators(result) if output == "accumulators" else result.batches(columns)
