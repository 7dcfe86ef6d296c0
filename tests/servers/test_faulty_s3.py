"""That the proxy changes nothing but what its rules say, and that each fault is what it is called."""

from __future__ import annotations

import http.client
import random
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3_faults import (
    CutRequest,
    CutResponse,
    DropWrite,
    HoldRequest,
    HoldResponse,
    LoseResponse,
    Refuse,
    SlowResponse,
    StripHeaders,
)
from tests.servers.seaweedfs import SeaweedServer
from tests.servers.test_seaweedfs import MIB, content, keys, refused, upload_parts


@pytest.fixture
def proxy(s3_server: SeaweedServer, s3_bucket: str) -> Iterator[FaultyS3]:
    threads = threading.active_count()
    with FaultyS3(s3_server) as proxy:
        yield proxy
    assert threading.active_count() == threads


@pytest.fixture
def direct(s3_server: SeaweedServer, s3_bucket: str) -> Any:
    return s3_server.client()


@pytest.fixture
def s3(proxy: FaultyS3) -> Any:
    """Through the proxy, without retries."""
    return proxy.client(retries={"total_max_attempts": 1})


class TestWithoutRules:
    """What arrives is what was sent."""

    def test_everything_passes(self, proxy: FaultyS3, s3: Any, s3_bucket: str, seed: random.Random) -> None:
        large = seed.randbytes(9 * MIB)
        for key in ("a b+c/ä&=%2F", "a/~!*'()", "empty"):
            s3.put_object(Bucket=s3_bucket, Key=key, Body=key.encode() * (key != "empty"))
            assert content(s3, s3_bucket, key) == key.encode() * (key != "empty")
        s3.complete_multipart_upload(**upload_parts(s3, s3_bucket, "large", large[: 5 * MIB], large[5 * MIB :]))
        assert content(s3, s3_bucket, "large") == large
        part = s3.get_object(Bucket=s3_bucket, Key="large", Range="bytes=10-19")
        assert (part["ResponseMetadata"]["HTTPStatusCode"], part["Body"].read()) == (206, large[10:20])
        assert s3.head_object(Bucket=s3_bucket, Key="large")["ContentLength"] == len(large)
        assert len(keys(s3, s3_bucket)) == 4
        s3.copy_object(Bucket=s3_bucket, Key="copy", CopySource={"Bucket": s3_bucket, "Key": "large"})
        s3.delete_object(Bucket=s3_bucket, Key="empty")
        s3.delete_objects(Bucket=s3_bucket, Delete={"Objects": [{"Key": key} for key in keys(s3, s3_bucket)]})
        with refused(404, "NoSuchKey"):
            s3.get_object(Bucket=s3_bucket, Key="large")
        with refused(404):
            s3.head_object(Bucket=s3_bucket, Key="large")
        assert proxy.counts == {
            ("PUT", "PutObject"): 3,
            ("GET", "GetObject"): 6,
            ("POST", "CreateMultipartUpload"): 1,
            ("PUT", "UploadPart"): 2,
            ("POST", "CompleteMultipartUpload"): 1,
            ("HEAD", "HeadObject"): 2,
            ("GET", "ListObjectsV2"): 2,
            ("PUT", "CopyObject"): 1,
            ("DELETE", "DeleteObject"): 1,
            ("POST", "DeleteObjects"): 1,
        }
        assert proxy.requests[0].key == "a b+c/ä&=%2F"

    def test_signatures_are_checked_as_without_it(self, proxy: FaultyS3, s3: Any, s3_bucket: str) -> None:
        s3._request_signer._credentials.secret_key = "wrong"
        with refused(403, "SignatureDoesNotMatch"):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a")
        proxy.on(StripHeaders(("X-Amz-Meta-Other",)), times=None)
        with refused(403, "SignatureDoesNotMatch"):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a")

    def test_presigned_urls_and_chunked_bodies(self, proxy: FaultyS3, s3: Any, s3_bucket: str) -> None:
        a = {"Bucket": s3_bucket, "Key": "a"}
        url = urlsplit(s3.generate_presigned_url("put_object", a, ExpiresIn=60))
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
        try:
            body = iter([b"one ", b"two ", b"three" * 50_000])
            connection.request("PUT", f"{url.path}?{url.query}", body=body, encode_chunked=True)
            assert connection.getresponse().status == 200
        finally:
            connection.close()
        with urllib.request.urlopen(s3.generate_presigned_url("get_object", a, ExpiresIn=60), timeout=30) as answer:
            assert answer.read() == b"one two " + b"three" * 50_000

    def test_many_connections_at_once(self, proxy: FaultyS3, s3: Any, s3_bucket: str, seed: random.Random) -> None:
        bodies = {f"{number}": seed.randbytes(200_000) for number in range(24)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: s3.put_object(Bucket=s3_bucket, Key=key, Body=bodies[key]), bodies))
            read = pool.map(lambda key: content(s3, s3_bucket, key), bodies)
        assert list(read) == list(bodies.values())

    def test_a_dead_server_is_a_cut_connection(
        self, s3_server: SeaweedServer, proxy: FaultyS3, s3: Any, s3_bucket: str
    ) -> None:
        s3_server.kill()
        with pytest.raises(ConnectionClosedError):
            s3.head_bucket(Bucket=s3_bucket)
        s3_server.start()
        s3.head_bucket(Bucket=s3_bucket)


class TestRequests:
    """Faults on the way to the server."""

    def test_a_refused_request_is_not_forwarded(self, proxy: FaultyS3, s3: Any, direct: Any, s3_bucket: str) -> None:
        for size in (1, 3 * MIB):
            rule = proxy.on(Refuse(), kind="PutObject")
            with refused(503, "SlowDown"):
                s3.put_object(Bucket=s3_bucket, Key="a", Body=bytes(size))
            assert rule.reached.is_set()
        assert keys(direct, s3_bucket) == []
        s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a")
        proxy.on(Refuse(403, "AccessDenied"), method="HEAD", times=2)
        for _ in range(2):
            with refused(403):
                s3.head_object(Bucket=s3_bucket, Key="a")
        s3.head_object(Bucket=s3_bucket, Key="a")

    def test_a_client_that_tries_again_gets_through(self, proxy: FaultyS3, s3_bucket: str) -> None:
        """The rule meets the second part only."""
        rule = proxy.on(Refuse(retry_after=0), method="PUT", query="partNumber=2", times=2)
        s3 = proxy.client(retries={"mode": "standard", "total_max_attempts": 3})
        s3.complete_multipart_upload(**upload_parts(s3, s3_bucket, "a", bytes(5 * MIB), b"end"))
        assert content(s3, s3_bucket, "a") == bytes(5 * MIB) + b"end"
        assert rule.met == 2
        assert proxy.counts["PUT", "UploadPart"] == 1 + 3

    def test_rules_are_met_in_order_and_until_cleared(self, proxy: FaultyS3, s3: Any, s3_bucket: str) -> None:
        proxy.on(Refuse(500, "InternalError"), key="b", times=1)
        proxy.on(Refuse(503, "SlowDown"), times=None)
        for key, status in (("a", 503), ("b", 500), ("b", 503), ("a", 503)):
            with refused(status):
                s3.put_object(Bucket=s3_bucket, Key=key, Body=b"")
        proxy.clear()
        s3.put_object(Bucket=s3_bucket, Key="a", Body=b"")
        assert sum(proxy.counts.values()) == 1

    @pytest.mark.parametrize("after", [0, 1000, 2 * MIB])
    def test_a_cut_request_stores_nothing(
        self, proxy: FaultyS3, s3: Any, direct: Any, s3_bucket: str, after: int
    ) -> None:
        proxy.on(CutRequest(after=after), kind="PutObject")
        with pytest.raises(ConnectionClosedError):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=bytes(3 * MIB))
        assert keys(direct, s3_bucket) == []
        s3.put_object(Bucket=s3_bucket, Key="a", Body=b"again")
        assert content(direct, s3_bucket, "a") == b"again"

    def test_a_held_request_comes_too_late(self, proxy: FaultyS3, s3: Any, direct: Any, s3_bucket: str) -> None:
        rule = proxy.on(HoldRequest(), kind="PutObject")
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(s3.put_object, Bucket=s3_bucket, Key="a", Body=b"late", IfNoneMatch="*")
            assert rule.reached.wait(30)
            direct.put_object(Bucket=s3_bucket, Key="a", Body=b"in time", IfNoneMatch="*")
            rule.release()
            with refused(412):
                late.result(60)
        assert content(direct, s3_bucket, "a") == b"in time"

    def test_a_dropped_part_was_acknowledged(self, proxy: FaultyS3, s3: Any, direct: Any, s3_bucket: str) -> None:
        proxy.on(DropWrite(), query="partNumber=1")
        upload = upload_parts(s3, s3_bucket, "a", bytes(5 * MIB), b"end")
        proxy.on(DropWrite(), kind="PutObject")
        dropped = s3.put_object(Bucket=s3_bucket, Key="b", Body=bytes(5 * MIB))["ETag"]
        assert upload["MultipartUpload"]["Parts"][0]["ETag"] == dropped
        with refused(400, "InvalidPart"):
            s3.complete_multipart_upload(**upload)
        assert keys(direct, s3_bucket) == []
        assert s3.put_object(Bucket=s3_bucket, Key="b", Body=bytes(5 * MIB))["ETag"] == dropped

    def test_a_store_without_conditional_writes(self, proxy: FaultyS3, s3: Any, direct: Any, s3_bucket: str) -> None:
        proxy.on(StripHeaders(), times=None)
        proxy.on(Refuse(), kind="PutObject")
        with refused(503):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=b"", IfNoneMatch="*")
        for body in (b"first", b"second"):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=body, IfNoneMatch="*")
            assert content(direct, s3_bucket, "a") == body
        s3.put_object(Bucket=s3_bucket, Key="a", Body=b"third", IfMatch='"other"')
        upload = upload_parts(s3, s3_bucket, "a", b"fourth")
        s3.complete_multipart_upload(**upload, IfNoneMatch="*")
        assert content(s3, s3_bucket, "a") == b"fourth"
        s3.delete_object(Bucket=s3_bucket, Key="a", IfMatch='"other"')
        assert keys(direct, s3_bucket) == []


class TestResponses:
    """Faults on the way back."""

    @pytest.mark.parametrize("after", [0, 1000, 2 * MIB])
    def test_a_cut_response_ends_after_so_many_bytes(
        self, proxy: FaultyS3, s3: Any, direct: Any, s3_bucket: str, seed: random.Random, after: int
    ) -> None:
        body = seed.randbytes(3 * MIB)
        direct.put_object(Bucket=s3_bucket, Key="a", Body=body)
        proxy.on(CutResponse(after=after), kind="GetObject")
        answer = s3.get_object(Bucket=s3_bucket, Key="a")
        assert answer["ContentLength"] == len(body)
        assert answer["Body"].read(after) == body[:after]
        with pytest.raises(ResponseStreamingError):
            answer["Body"].read()
        assert content(s3, s3_bucket, "a") == body

    def test_a_lost_response_leaves_the_write_in_doubt(
        self, proxy: FaultyS3, s3: Any, direct: Any, s3_bucket: str
    ) -> None:
        proxy.on(LoseResponse(), kind="PutObject")
        with pytest.raises(ConnectionClosedError):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a", IfNoneMatch="*")
        assert content(direct, s3_bucket, "a") == b"a"
        with refused(412):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a", IfNoneMatch="*")

    def test_a_slow_response(self, proxy: FaultyS3, s3: Any, direct: Any, s3_bucket: str) -> None:
        direct.put_object(Bucket=s3_bucket, Key="a", Body=bytes(1000))
        proxy.on(SlowResponse(0.05, chunk=100), kind="GetObject")
        begin = time.monotonic()
        assert content(s3, s3_bucket, "a") == bytes(1000)
        assert time.monotonic() - begin >= 10 * 0.05
        proxy.on(SlowResponse(60), kind="GetObject")
        hasty = proxy.client(read_timeout=0.2, retries={"total_max_attempts": 1})
        begin = time.monotonic()
        with pytest.raises(ReadTimeoutError):
            content(hasty, s3_bucket, "a")
        assert time.monotonic() - begin < 30

    @pytest.mark.parametrize("after", [0, 1000])
    def test_a_held_response_goes_on_when_released(
        self, proxy: FaultyS3, s3: Any, direct: Any, s3_bucket: str, seed: random.Random, after: int
    ) -> None:
        """A read that has begun ends with what it began with, whatever is done to the object."""
        body = seed.randbytes(3 * MIB)
        direct.put_object(Bucket=s3_bucket, Key="a", Body=body)
        rule = proxy.on(HoldResponse(after=after), kind="GetObject")
        answer = s3.get_object(Bucket=s3_bucket, Key="a")
        assert answer["Body"].read(after) == body[:after]
        assert rule.reached.wait(30)
        direct.delete_object(Bucket=s3_bucket, Key="a")
        rule.release()
        assert answer["Body"].read() == body[after:]


def test_closing_ends_what_is_held(s3_server: SeaweedServer, s3_bucket: str) -> None:
    threads = threading.active_count()
    with FaultyS3(s3_server) as proxy, ThreadPoolExecutor(1) as pool:
        rule = proxy.on(HoldRequest(), times=None)
        s3 = proxy.client(retries={"total_max_attempts": 1})
        held = pool.submit(s3.put_object, Bucket=s3_bucket, Key="a", Body=b"a")
        assert rule.reached.wait(30)
        proxy.close()
        with pytest.raises(BotoCoreError):
            held.result(30)
    assert threading.active_count() == threads
    assert keys(s3_server.client(), s3_bucket) == []


def test_a_mistake_in_the_proxy_does_not_pass_for_a_fault(s3_server: SeaweedServer, s3_bucket: str) -> None:
    proxy = FaultyS3(s3_server)
    proxy.on(Refuse(status="no number"))  # type: ignore[arg-type]
    with pytest.raises((BotoCoreError, ClientError)):
        proxy.client(retries={"total_max_attempts": 1}).head_bucket(Bucket=s3_bucket)
    with pytest.raises(RuntimeError, match="faulty-s3 itself"):
        proxy.close()
