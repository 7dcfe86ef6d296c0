"""From `S3PickleIOManager` to `ClaimCheckIOManager`, in the same bucket, as docs/patterns/claim-check.md tells."""

import dagster as dg
import pandas as pd
from dagster_aws.s3 import S3PickleIOManager

import djp_dagster as djp
from tests.orchestration.claim_check.kit import Runner, error_of, s3_resource
from tests.servers.seaweedfs import SeaweedServer

FRAME = pd.DataFrame({"n": range(1000)})


@dg.asset
def old() -> pd.DataFrame:
    return FRAME


@dg.asset
def reader(old: pd.DataFrame) -> int:
    return len(old)


@dg.asset(name="reader", ins={"old": dg.AssetIn("old", input_manager_key="pickles")})
def reader_meanwhile(old: pd.DataFrame) -> int:
    return len(old)


def test_migration(instance: dg.DagsterInstance, s3_server: SeaweedServer, s3_bucket: str) -> None:
    s3 = s3_resource(s3_server)
    pickles = S3PickleIOManager(s3_resource=s3, s3_bucket=s3_bucket)
    store = djp.S3PayloadStore(bucket=s3_bucket, s3=s3, addressing="path")
    run = Runner(instance, djp.ClaimCheckIOManager(store=store))
    dg.materialize([old], instance=instance, resources={"io_manager": pickles})

    error = error_of(run([old, reader], "reader", fails=True))
    assert "PayloadMissingError" in error
    assert "materialize it with this IO manager" in error
    result = run([old, reader_meanwhile], "reader", pickles=pickles)
    assert result.output_for_node("reader") == 1000
    assert run([old, reader]).output_for_node("reader") == 1000

    keys = {one["Key"] for one in s3_server.client().list_objects_v2(Bucket=s3_bucket)["Contents"]}
    assert "dagster/old" in keys, "the old objects are not touched"
    defs = dg.Definitions([old], resources={"io_manager": run.manager})
    pd.testing.assert_frame_equal(defs.load_asset_value("old", instance=instance), FRAME)
