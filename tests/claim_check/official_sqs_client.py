"""The official amazon-sqs-extended-client in a process of its own, for it changes boto3 for the whole process.

Started as a script, it reads one JSON document a line, does what it says, and answers with one line each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


class OfficialClient:
    """The other end of the pipe.

    Args:
        environment: where its AWS clients find their servers.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={"PATH": os.defpath, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, do: str, queue: str, bucket: str, **more: Any) -> Any:
        """What the client returned; an error of its is a RuntimeError with its name."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, "queue": queue, "bucket": bucket, **more}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _answer(client: Any, job: dict[str, Any]) -> Any:
    from sqs_extended_client import client as module

    client.large_payload_support = job["bucket"]
    client.use_legacy_attribute = job.get("legacy", False)
    client.always_through_s3 = job.get("always", False)
    client.delete_payload_from_s3 = True
    module.DEFAULT_MESSAGE_SIZE_THRESHOLD = job.get("threshold", 262_144)
    queue = job["queue"]
    if job["do"] == "send":
        sent = client.send_message(QueueUrl=queue, MessageBody=job["body"], MessageAttributes=job.get("attributes", {}))
        return sent["MessageId"]
    if job["do"] == "receive":
        got = client.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, MessageAttributeNames=["All"])
        return [
            {"body": one["Body"], "handle": one["ReceiptHandle"], "attributes": one.get("MessageAttributes", {})}
            for one in got.get("Messages", [])
        ]
    assert job["do"] == "delete"
    return client.delete_message(QueueUrl=queue, ReceiptHandle=job["handle"])["ResponseMetadata"]["HTTPStatusCode"]


def _main() -> None:
    import boto3
    import sqs_extended_client  # noqa: F401

    client = boto3.client("sqs")
    for line in sys.stdin:
        try:
            answer = {"value": _answer(client, json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
