"""A large file put into S3 and got back, by our store and by boto3's managed transfer, and read as a stream.

Ours hashes the file, looks whether it is there, creates it only if not, and verifies what it gets. boto3 does none of
that; over http it hashes every part to sign it.
"""

import filecmp
import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.claim_check_process import MIB, Meter, Variants, fresh_bucket, process, s3_client, store_in
from benchmarks.harness import Row, Settings
from djp_dagster import Claim, PayloadStore
from tests.servers.seaweedfs import SeaweedServer

_LIMIT_MIB = 64
_TARGET = 0.95
_KEY = "peer"
_BLOCK_BYTES = 8 * MIB


def put_ours(meter: Meter, bucket: str, source: str) -> dict[str, Any]:
    store = _warm(bucket)
    with meter():
        stored = store.put(Path(source))
    assert not stored.deduplicated
    assert store.info(stored.ref).bytes == Path(source).stat().st_size
    return stored.claim.to_dict()


def put_peer(meter: Meter, bucket: str, source: str) -> dict[str, Any]:
    client = _warm_peer(bucket)
    with meter():
        client.upload_file(source, bucket, _KEY)
    assert client.head_object(Bucket=bucket, Key=_KEY)["ContentLength"] == Path(source).stat().st_size
    return {}


def get_ours(meter: Meter, bucket: str, source: str, claim: dict[str, Any]) -> dict[str, Any]:
    store = _warm(bucket)
    with _target(source) as path, meter():
        store.download(Claim.from_dict(claim), path)
    return {}


def get_peer(meter: Meter, bucket: str, source: str, claim: dict[str, Any]) -> dict[str, Any]:
    client = _warm_peer(bucket)
    with _target(source) as path, meter():
        client.download_file(bucket, _key_of(claim, bucket), str(path))
    return {}


def get_peer_hashed(meter: Meter, bucket: str, source: str, claim: dict[str, Any]) -> dict[str, Any]:
    """As careful as ours: the file is hashed."""
    client = _warm_peer(bucket)
    with _target(source) as path, meter():
        client.download_file(bucket, _key_of(claim, bucket), str(path))
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(MIB)
            while read := file.readinto(buffer):
                digest.update(memoryview(buffer)[:read])
        assert digest.hexdigest() == claim["sha256"]
    return {}


def stream_ours(meter: Meter, bucket: str, source: str, claim: dict[str, Any]) -> dict[str, Any]:
    store = _warm(bucket)
    with meter(), store.open(Claim.from_dict(claim)) as file:
        check = _read(file)
    return {"check": check}


def stream_peer(meter: Meter, bucket: str, source: str, claim: dict[str, Any]) -> dict[str, Any]:
    client = _warm_peer(bucket)
    with meter():
        check = _read(client.get_object(Bucket=bucket, Key=_key_of(claim, bucket))["Body"])
    return {"check": check}


def _warm(bucket: str) -> PayloadStore:
    store = store_in(bucket)
    # Every module is loaded, and every connection opened, that a large payload needs.
    store.read(store.put(b"first", expires_in="1d").claim)
    return store


def _warm_peer(bucket: str) -> Any:
    client = s3_client()
    client.put_object(Bucket=bucket, Key="first", Body=b"first")
    client.get_object(Bucket=bucket, Key="first")["Body"].read()
    return client


@contextmanager
def _target(source: str) -> Iterator[Path]:
    """A file to write to, which must be the same as the source at the end of the block, and is removed."""
    path = Path(source).with_name("got")
    try:
        yield path
        assert filecmp.cmp(source, path, shallow=False)
    finally:
        path.unlink(missing_ok=True)


def _key_of(claim: dict[str, Any], bucket: str) -> str:
    return Claim.from_dict(claim).uri.removeprefix(f"s3://{bucket}/")


def _read(file: BinaryIO) -> int:
    """All of it, a mebibyte at a time; its CRC-32."""
    check = 0
    while piece := file.read(MIB):
        check = zlib.crc32(piece, check)
    return check


def run(server: SeaweedServer, folder: Path, settings: Settings, size: int) -> list[Row]:
    """Three comparisons with the same bytes."""
    source = folder / "source"
    check = _write(source, size)
    variants = Variants(server, settings.rounds)
    variants.run({"put ours": put_ours, "put peer": put_peer}, source=str(source))
    with fresh_bucket(server) as bucket:
        claim = process(server, put_ours, {"bucket": bucket, "source": str(source)}).told
        stored = {"bucket": bucket, "source": str(source), "claim": claim}
        gets = {"get ours": get_ours, "get peer": get_peer, "get peer, hashed": get_peer_hashed}
        variants.run({**gets, "stream ours": stream_ours, "stream peer": stream_peer}, **stored)
    assert {one.told["check"] for way in ("ours", "peer") for one in variants.found[f"stream {way}"]} == {check}
    hash_s = _hash_s(source)
    source.unlink()
    get, put = variants.speed("get peer, hashed", size / 1e6, "MB/s"), f"{size / MIB:,.0f} MiB"
    hashed = variants.ratio("get ours", "get peer, hashed")
    return [
        Row(f"sha256 of a file of {put}, nothing else", f"{size / 1e6 / hash_s:,.0f} MB/s"),
        *_rows(variants, "put", "  put it / upload_file", size),
        *_rows(variants, "get", "  get it as a file, verified / download_file", size),
        Row("    / download_file, then sha256 of the file", "", get, f"{hashed:.2f}x"),
        *_rows(variants, "stream", "  read it as a stream, verified / get_object", size),
    ]


def _hash_s(path: Path) -> float:
    started = time.perf_counter()
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(MIB):
            digest.update(block)
    return time.perf_counter() - started


def _write(path: Path, size: int) -> int:
    """A file of random bytes; its CRC-32."""
    check = 0
    with path.open("wb") as file:
        while size:
            block = os.urandom(min(size, _BLOCK_BYTES))
            check = zlib.crc32(block, check)
            size -= file.write(block)
    return check


def _rows(variants: Variants, way: str, what: str, size: int) -> Iterator[Row]:
    ours, peer = f"{way} ours", f"{way} peer"
    ratio = variants.ratio(ours, peer)
    speeds = (variants.speed(name, size / 1e6, "MB/s") for name in (ours, peer))
    target = None if way == "stream" else _TARGET
    wanted = f"≥ {target:g}x" if target else ""
    yield Row(what, *speeds, f"{ratio:.2f}x", wanted, ratio >= target if target else None)
    risen = variants.median(ours, lambda one: one.risen_bytes) / MIB
    cost = (variants.cost(name) for name in (ours, peer))
    yield Row("    peak memory over idle; processor + server", *cost, "", f"≤ {_LIMIT_MIB} MiB", risen <= _LIMIT_MIB)
