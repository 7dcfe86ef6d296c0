"""That the moto server does what the tests use it for, and leaves nothing behind."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError

from tests.servers.moto_server import MotoServer, has_moto


def test_queues(moto_server: MotoServer) -> None:
    sqs = moto_server.client(service="sqs")
    queue = sqs.create_queue(QueueName="a")["QueueUrl"]
    sqs.send_message(QueueUrl=queue, MessageBody="body")
    (message,) = sqs.receive_message(QueueUrl=queue)["Messages"]
    assert message["Body"] == "body"
    moto_server.reset()
    assert "QueueUrls" not in sqs.list_queues()


def test_a_dropped_bucket_is_gone_with_all_that_is_in_it(moto_server: MotoServer) -> None:
    s3, bucket = moto_server.client(), moto_server.new_bucket()
    s3.put_object(Bucket=bucket, Key="a/b", Body=b"c")
    s3.create_multipart_upload(Bucket=bucket, Key="unfinished")
    moto_server.drop_bucket(bucket)
    with pytest.raises(ClientError, match="404"):
        s3.head_bucket(Bucket=bucket)


@pytest.mark.servers
def test_a_server_of_its_own_forgets_and_leaves_nothing_behind() -> None:
    if not has_moto():
        pytest.skip("no moto server found")
    server = MotoServer()
    try:
        server.start()
        port, bucket = server.port, server.new_bucket()
        server.kill()
        server.start()
        assert server.port == port
        with pytest.raises(ClientError, match="404"):
            server.client().head_bucket(Bucket=bucket)
        server.stop()
        assert not server.running
    finally:
        server.close()
    assert not server._home.exists()
