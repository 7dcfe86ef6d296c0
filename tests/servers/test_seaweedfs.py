"""That SeaweedFS does what the tests of the claim check build on, and leaves nothing behind."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.conftest import REPOSITORY
from tests.servers.s3_server import S3Server
from tests.servers.seaweedfs import SeaweedServer, find_weed

MIB = 1024 * 1024
WRITERS = 8


@pytest.fixture
def s3(s3_server: SeaweedServer, s3_bucket: str) -> Any:
    return s3_server.client()


@contextmanager
def refused(status: int, code: str | None = None) -> Iterator[None]:
    with pytest.raises(ClientError) as caught:
        yield
    answer = caught.value.response
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == status
    assert code in {None, answer["Error"]["Code"]}


def wait_for(condition: Callable[[], bool], what: str, patience_s: float = 15) -> None:
    give_up = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < give_up, f"still waiting for {what}"
        time.sleep(0.05)


def content(s3: Any, bucket: str, key: str) -> bytes:
    body: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    return body


def keys(s3: Any, bucket: str) -> list[str]:
    return [found["Key"] for found in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]


def upload_parts(s3: Any, bucket: str, key: str, *parts: bytes) -> dict[str, Any]:
    """What completes the upload, as arguments."""
    upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    done = [
        {
            "PartNumber": number,
            "ETag": s3.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=part)["ETag"],
        }
        for number, part in enumerate(parts, start=1)
    ]
    return {"Bucket": bucket, "Key": key, "UploadId": upload, "MultipartUpload": {"Parts": done}}


def race(server: S3Server, do: Callable[[Any, int], object]) -> list[int]:
    """The writers that succeeded of those that began at once; the others must have been refused with 412."""
    clients = [server.client(read_timeout=60) for _ in range(WRITERS)]
    begin = threading.Barrier(WRITERS)

    def attempt(number: int) -> bool:
        begin.wait(30)
        try:
            do(clients[number], number)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                raise
            return False
        return True

    with ThreadPoolExecutor(WRITERS) as pool:
        return [number for number, done in enumerate(pool.map(attempt, range(WRITERS))) if done]


class TestProcess:
    """Started and stopped without a trace."""

    def test_it_listens_on_the_loopback_interface_only(self, s3_server: SeaweedServer, s3_bucket: str) -> None:
        own = {str(link.readlink()) for link in Path(f"/proc/{s3_server.pid}/fd").iterdir() if link.is_symlink()}
        addresses = []
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                local, state, inode = (line.split()[field] for field in (1, 3, 9))
                if state == "0A" and f"socket:[{inode}]" in own:
                    addresses.append(local.partition(":")[0])
        assert len(addresses) == 10
        assert set(addresses) == {"0100007F"}

    def test_the_environment_leads_a_process_to_it(self, s3_server: SeaweedServer, s3_bucket: str) -> None:
        program = f"import boto3; boto3.client('s3').put_object(Bucket={s3_bucket!r}, Key='a', Body=b'other')"
        environment = {"PATH": os.defpath, **s3_server.environment}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
        assert content(s3_server.client(), s3_bucket, "a") == b"other"

    @pytest.mark.parametrize("outage", ["kill", "stop"])
    def test_what_was_acknowledged_outlives_an_outage(
        self, s3_server: SeaweedServer, s3_bucket: str, s3: Any, seed: random.Random, outage: str
    ) -> None:
        small, large = seed.randbytes(100), seed.randbytes(9 * MIB)
        s3.put_object(Bucket=s3_bucket, Key="small", Body=small, Tagging="djp-ttl=7d", Metadata={"a": "b"})
        s3.complete_multipart_upload(**upload_parts(s3, s3_bucket, "large", large[: 5 * MIB], large[5 * MIB :]))
        unfinished = upload_parts(s3, s3_bucket, "unfinished", b"part")
        before = s3.head_object(Bucket=s3_bucket, Key="small")
        port, pid = s3_server.port, s3_server.pid
        getattr(s3_server, outage)()
        assert not s3_server.running
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(s3_server.endpoint_url, timeout=5)
        s3_server.start()
        assert (s3_server.port, s3_server.pid != pid) == (port, True)
        after = s3.head_object(Bucket=s3_bucket, Key="small")
        assert [after[name] for name in ("ETag", "LastModified", "Metadata", "TagCount")] == [
            *(before[name] for name in ("ETag", "LastModified", "Metadata")),
            1,
        ]
        assert content(s3, s3_bucket, "small") == small
        assert content(s3, s3_bucket, "large") == large
        s3.complete_multipart_upload(**unfinished)
        assert content(s3, s3_bucket, "unfinished") == b"part"

    def test_no_acknowledged_write_is_lost_by_sigkill(
        self, s3_server: SeaweedServer, s3_bucket: str, seed: random.Random
    ) -> None:
        """Four writers at work while the server is killed."""
        acknowledged: dict[str, bytes] = {}
        seeds = [seed.getrandbits(32) for _ in range(4)]

        def write(number: int) -> None:
            draw = random.Random(seeds[number])
            client = s3_server.client(retries={"total_max_attempts": 1})
            for count in range(10_000):
                body = draw.randbytes(draw.choice([10, 5_000, 300_000]))
                try:
                    client.put_object(Bucket=s3_bucket, Key=f"{number}/{count}", Body=body, IfNoneMatch="*")
                except Exception:
                    return
                acknowledged[f"{number}/{count}"] = body

        with ThreadPoolExecutor(4) as pool:
            working = [pool.submit(write, number) for number in range(4)]
            wait_for(lambda: len(acknowledged) >= 40, "the writers")
            s3_server.kill()
            for writer in working:
                writer.result(60)
        s3_server.start()
        s3 = s3_server.client()
        assert {key: content(s3, s3_bucket, key) for key in acknowledged} == acknowledged

    @pytest.mark.servers
    def test_a_server_of_its_own_leaves_nothing_behind(self) -> None:
        weed = find_weed()
        if weed is None:
            pytest.skip("no SeaweedFS found")
        server = SeaweedServer(weed)
        try:
            server.start()
            server.start()
            assert [path.name for path in server._sockets() if path.exists()]
            server.client().put_object(Bucket=server.new_bucket(), Key="a", Body=b"a")
            server.kill()
            assert not [path for path in server._sockets() if path.exists()]
            server.start()
            guard = server._guard._process
        finally:
            server.close()
        assert not server.running
        assert guard.returncode == 0
        assert not [path for path in (server._home, *server._sockets()) if path.exists()]

    @pytest.mark.parametrize("last", ["start", "kill"])
    def test_a_killed_test_run_leaves_nothing_behind(self, s3_server: SeaweedServer, last: str) -> None:
        """Whether its server ran at that moment or not."""
        program = (
            "from tests.servers.seaweedfs import SeaweedServer, find_weed\n"
            "server = SeaweedServer(find_weed())\n"
            "server.start()\n"
            "pid = server.pid\n"
            f"server.{last}()\n"
            "print(pid, server._home, *server._sockets(), flush=True)\n"
            "input()\n"
        )
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            pid, *paths = run.stdout.readline().decode().split()
            assert Path(paths[0]).is_dir()
            assert Path("/proc", pid).exists() == (last == "start")
            run.send_signal(signal.SIGKILL)
            run.communicate(timeout=10)
        wait_for(lambda: not any(Path(path).exists() for path in ["/proc/" + pid, *paths]), "the guard")

    def test_a_dropped_bucket_is_gone_with_all_that_is_in_it(self, s3_server: SeaweedServer, s3: Any) -> None:
        bucket = s3_server.new_bucket()
        s3.put_object(Bucket=bucket, Key="a/b", Body=b"c")
        upload_parts(s3, bucket, "unfinished", b"part")
        s3_server.drop_bucket(bucket)
        with refused(404):
            s3.head_bucket(Bucket=bucket)
        s3_server.drop_bucket(bucket)


class TestRefusals:
    """What is wrong is refused, and not stored."""

    def test_a_wrong_secret_and_none(self, s3_server: SeaweedServer, s3_bucket: str, s3: Any) -> None:
        s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a")
        stranger = s3_server.client()
        stranger._request_signer._credentials.secret_key = "wrong"
        with refused(403, "SignatureDoesNotMatch"):
            stranger.get_object(Bucket=s3_bucket, Key="a")
        with refused(403, "SignatureDoesNotMatch"):
            stranger.put_object(Bucket=s3_bucket, Key="b", Body=b"b")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{s3_server.endpoint_url}/{s3_bucket}/a", timeout=5)
        assert keys(s3, s3_bucket) == ["a"]

    @pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "crc32"])
    def test_a_wrong_checksum(self, s3_bucket: str, s3: Any, algorithm: str) -> None:
        size = {"md5": 16, "sha1": 20, "sha256": 32, "crc32": 4}[algorithm]
        wrong = base64.b64encode(bytes(size)).decode()
        checksum = {"ContentMD5" if algorithm == "md5" else f"Checksum{algorithm.upper()}": wrong}
        with refused(400, "BadDigest"):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a", **checksum)
        assert keys(s3, s3_bucket) == []
        upload = upload_parts(s3, s3_bucket, "a")
        part = {name: upload[name] for name in ("Bucket", "Key", "UploadId")}
        with refused(400, "BadDigest"):
            s3.upload_part(**part, PartNumber=1, Body=b"a", **checksum)
        assert "Parts" not in s3.list_parts(**part)

    def test_a_part_that_was_not_uploaded(self, s3_bucket: str, s3: Any) -> None:
        upload = upload_parts(s3, s3_bucket, "a", bytes(5 * MIB), b"end")
        upload["MultipartUpload"]["Parts"][1]["ETag"] = f'"{hashlib.md5(b"other").hexdigest()}"'
        with refused(400, "InvalidPart"):
            s3.complete_multipart_upload(**upload)
        assert keys(s3, s3_bucket) == []

    def test_a_bucket_that_does_not_exist_or_is_not_empty(self, s3_bucket: str, s3: Any) -> None:
        with refused(404, "NoSuchBucket"):
            s3.put_object(Bucket=f"{s3_bucket}-other", Key="a", Body=b"a")
        s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a")
        with refused(409, "BucketNotEmpty"):
            s3.delete_bucket(Bucket=s3_bucket)

    def test_a_presigned_url_that_has_expired_or_was_changed(self, s3_bucket: str, s3: Any) -> None:
        for key in ("a", "b"):
            s3.put_object(Bucket=s3_bucket, Key=key, Body=key.encode())

        def presigned(seconds: int) -> str:
            url: str = s3.generate_presigned_url("get_object", {"Bucket": s3_bucket, "Key": "a"}, ExpiresIn=seconds)
            return url

        def status(url: str) -> int:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        url = presigned(60)
        assert (status(url), status(url.replace("/a?", "/b?"))) == (200, 403)
        short = presigned(2)
        assert status(short) == 200
        wait_for(lambda: status(short) == 403, "the URL to expire")


class TestConditionalWrites:
    """Who may write, is decided by what is there."""

    def test_create_only(self, s3_bucket: str, s3: Any) -> None:
        s3.put_object(Bucket=s3_bucket, Key="a", Body=b"first", IfNoneMatch="*")
        with refused(412, "PreconditionFailed"):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=b"second", IfNoneMatch="*")
        with refused(412, "PreconditionFailed"):
            s3.complete_multipart_upload(**upload_parts(s3, s3_bucket, "a", b"third"), IfNoneMatch="*")
        s3.put_object(Bucket=s3_bucket, Key="b", Body=b"fourth")
        with refused(412, "PreconditionFailed"):
            s3.copy_object(Bucket=s3_bucket, Key="a", CopySource=f"{s3_bucket}/b", IfNoneMatch="*")
        assert content(s3, s3_bucket, "a") == b"first"
        # A refused completion keeps its upload: who does not abort it leaves it behind.
        assert len(s3.list_multipart_uploads(Bucket=s3_bucket)["Uploads"]) == 1

    def test_compare_and_set(self, s3_bucket: str, s3: Any) -> None:
        first = s3.put_object(Bucket=s3_bucket, Key="a", Body=b"first")["ETag"]
        second = s3.put_object(Bucket=s3_bucket, Key="a", Body=b"second", IfMatch=first)["ETag"]
        with refused(412):
            s3.put_object(Bucket=s3_bucket, Key="a", Body=b"third", IfMatch=first)
        with refused(412):
            s3.complete_multipart_upload(**upload_parts(s3, s3_bucket, "a", b"third"), IfMatch=first)
        with refused(412):  # AWS answers 404
            s3.put_object(Bucket=s3_bucket, Key="missing", Body=b"", IfMatch=first)
        assert content(s3, s3_bucket, "a") == b"second"
        s3.complete_multipart_upload(**upload_parts(s3, s3_bucket, "a", b"third"), IfMatch=second)
        assert content(s3, s3_bucket, "a") == b"third"

    def test_conditional_delete(self, s3_bucket: str, s3: Any) -> None:
        old = s3.put_object(Bucket=s3_bucket, Key="a", Body=b"old")["ETag"]
        new = s3.put_object(Bucket=s3_bucket, Key="a", Body=b"new")["ETag"]
        with refused(412):
            s3.delete_object(Bucket=s3_bucket, Key="a", IfMatch=old)
        errors = s3.delete_objects(Bucket=s3_bucket, Delete={"Objects": [{"Key": "a", "ETag": old}]})["Errors"]
        assert [error["Code"] for error in errors] == ["PreconditionFailed"]
        s3.delete_object(Bucket=s3_bucket, Key="a", IfMatch=new)
        assert keys(s3, s3_bucket) == []
        with refused(412):
            s3.delete_object(Bucket=s3_bucket, Key="a", IfMatch=new)
        s3.delete_object(Bucket=s3_bucket, Key="a")

    @pytest.mark.parametrize("size", [1, MIB])
    def test_of_racing_creates_exactly_one_wins(
        self, s3_server: SeaweedServer, s3_bucket: str, s3: Any, size: int
    ) -> None:
        for key in ("first", "second"):

            def create(client: Any, number: int, key: str = key) -> None:
                client.put_object(Bucket=s3_bucket, Key=key, Body=b"%d" % number * size, IfNoneMatch="*")

            assert [b"%d" % winner * size for winner in race(s3_server, create)] == [content(s3, s3_bucket, key)]

    def test_of_racing_replacements_and_deletes_exactly_one_wins(
        self, s3_server: SeaweedServer, s3_bucket: str, s3: Any
    ) -> None:
        for key in ("first", "second"):
            seen = s3.put_object(Bucket=s3_bucket, Key=key, Body=b"old")["ETag"]

            def replace_or_delete(client: Any, number: int, key: str = key, seen: str = seen) -> None:
                if number % 4:
                    client.put_object(Bucket=s3_bucket, Key=key, Body=b"%d" % number, IfMatch=seen)
                else:
                    client.delete_object(Bucket=s3_bucket, Key=key, IfMatch=seen)

            (winner,) = race(s3_server, replace_or_delete)
            left = content(s3, s3_bucket, key) if key in keys(s3, s3_bucket) else None
            assert left == (b"%d" % winner if winner % 4 else None)

    def test_compare_and_set_counts_every_increment(self, s3_server: SeaweedServer, s3_bucket: str, s3: Any) -> None:
        s3.put_object(Bucket=s3_bucket, Key="counter", Body=b"0")

        def increment(client: Any) -> None:
            for _ in range(5):
                while True:
                    seen = client.get_object(Bucket=s3_bucket, Key="counter")
                    body = b"%d" % (int(seen["Body"].read()) + 1)
                    try:
                        client.put_object(Bucket=s3_bucket, Key="counter", Body=body, IfMatch=seen["ETag"])
                    except ClientError as error:
                        if error.response["Error"]["Code"] != "PreconditionFailed":
                            raise
                    else:
                        break

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(increment, s3_server.client(read_timeout=60)) for _ in range(4)]:
                done.result(120)
        assert content(s3, s3_bucket, "counter") == b"20"

    def test_of_racing_completions_more_than_one_may_win(
        self, s3_server: SeaweedServer, s3_bucket: str, s3: Any
    ) -> None:
        """SeaweedFS checks the condition, but holds no lock until it has written: only this much is sure."""
        uploads = [upload_parts(s3, s3_bucket, "a", b"%d" % number * 1000) for number in range(WRITERS)]
        winners = race(
            s3_server, lambda client, number: client.complete_multipart_upload(**uploads[number], IfNoneMatch="*")
        )
        assert content(s3, s3_bucket, "a") in [b"%d" % winner * 1000 for winner in winners]


class TestObjects:
    """What the store says about what it keeps."""

    def test_the_etag_is_the_md5_of_the_body_or_of_the_md5s_of_the_parts(
        self, s3_bucket: str, s3: Any, seed: random.Random
    ) -> None:
        parts = [seed.randbytes(9 * MIB), seed.randbytes(10)]
        put = s3.put_object(Bucket=s3_bucket, Key="a", Body=parts[0])["ETag"]
        assert put == f'"{hashlib.md5(parts[0]).hexdigest()}"'
        multipart = s3.complete_multipart_upload(**upload_parts(s3, s3_bucket, "b", *parts))["ETag"]
        of_parts = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest()
        assert multipart == f'"{of_parts}-2"'
        listed = s3.list_objects_v2(Bucket=s3_bucket)["Contents"]
        assert [found["ETag"] for found in listed] == [put, multipart]

    def test_times_are_whole_seconds_of_the_servers_clock(self, s3_bucket: str, s3: Any) -> None:
        begin = datetime.now(timezone.utc).replace(microsecond=0)
        s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a")
        head = s3.head_object(Bucket=s3_bucket, Key="a")
        answered = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        listed = s3.list_objects_v2(Bucket=s3_bucket)["Contents"][0]["LastModified"]
        assert begin <= head["LastModified"] <= answered <= datetime.now(timezone.utc)
        assert listed == head["LastModified"]
        assert listed.microsecond == 0

    def test_a_multipart_object_is_as_old_as_its_completion(self, s3_bucket: str, s3: Any) -> None:
        upload = upload_parts(s3, s3_bucket, "a", b"a")

        def now() -> datetime:
            answer = s3.head_bucket(Bucket=s3_bucket)["ResponseMetadata"]["HTTPHeaders"]["date"]
            return parsedate_to_datetime(answer)

        uploaded = now()
        wait_for(lambda: now() > uploaded, "the next second")
        s3.complete_multipart_upload(**upload)
        assert s3.head_object(Bucket=s3_bucket, Key="a")["LastModified"] > uploaded

    @pytest.mark.parametrize("multipart", [False, True])
    def test_a_copy_onto_itself_makes_an_object_young_again(self, s3_bucket: str, s3: Any, multipart: bool) -> None:
        if multipart:
            s3.complete_multipart_upload(**upload_parts(s3, s3_bucket, "a", b"a"))
        else:
            s3.put_object(Bucket=s3_bucket, Key="a", Body=b"a")
        old = s3.head_object(Bucket=s3_bucket, Key="a")
        itself = {"Bucket": s3_bucket, "Key": "a", "CopySource": f"{s3_bucket}/a"}
        with refused(400, "InvalidRequest"):
            s3.copy_object(**itself)
        with refused(412):
            s3.copy_object(**itself, MetadataDirective="REPLACE", CopySourceIfMatch='"other"')

        def is_younger() -> bool:
            s3.copy_object(**itself, MetadataDirective="REPLACE", CopySourceIfMatch=old["ETag"])
            return bool(s3.head_object(Bucket=s3_bucket, Key="a")["LastModified"] > old["LastModified"])

        wait_for(is_younger, "the next second")
        assert s3.head_object(Bucket=s3_bucket, Key="a")["ETag"] == old["ETag"]
        assert content(s3, s3_bucket, "a") == b"a"

    def test_tags(self, s3_bucket: str, s3: Any) -> None:
        a = {"Bucket": s3_bucket, "Key": "a"}
        s3.put_object(**a, Body=b"a", Tagging="djp-ttl=7d")
        assert s3.get_object_tagging(**a)["TagSet"] == [{"Key": "djp-ttl", "Value": "7d"}]
        old = s3.head_object(**a)
        s3.put_object_tagging(**a, Tagging={"TagSet": [{"Key": "djp-ttl", "Value": "8d"}]})
        assert s3.get_object_tagging(**a)["TagSet"] == [{"Key": "djp-ttl", "Value": "8d"}]
        new = s3.head_object(**a)
        assert (new["ETag"], new["TagCount"]) == (old["ETag"], 1)
        upload = s3.create_multipart_upload(Bucket=s3_bucket, Key="b", Tagging="djp-ttl=9d")["UploadId"]
        part = s3.upload_part(Bucket=s3_bucket, Key="b", UploadId=upload, PartNumber=1, Body=b"b")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        s3.complete_multipart_upload(Bucket=s3_bucket, Key="b", UploadId=upload, MultipartUpload=parts)
        assert s3.get_object_tagging(Bucket=s3_bucket, Key="b")["TagSet"] == [{"Key": "djp-ttl", "Value": "9d"}]

    def test_objects_are_listed_at_once_and_folder_by_folder(self, s3_bucket: str, s3: Any) -> None:
        """Not by the bytes of their keys, as AWS lists them."""
        in_order = ["p/a", "p/a/1", "p/a-1", "p/a.1", "p/b", "p!"]
        assert sorted(in_order) != in_order
        for key in sorted(in_order):
            s3.put_object(Bucket=s3_bucket, Key=key, Body=b"")
        for size in (1, 2, 1000):
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=s3_bucket, PaginationConfig={"PageSize": size})
            assert [found["Key"] for page in pages for found in page["Contents"]] == in_order
        for key in in_order:
            s3.delete_object(Bucket=s3_bucket, Key=key)
        assert keys(s3, s3_bucket) == []
