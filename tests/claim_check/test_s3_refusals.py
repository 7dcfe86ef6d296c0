"""What an S3 server does not let us do: said with its code and a remedy, and without a secret."""

import logging
import os
import pickle
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import PayloadStore
from djp_dagster.errors import (
    DjpError,
    PayloadStoreRefusedError,
    PayloadStoreUnavailableError,
)
from tests.claim_check.kit import MIB, Place, keys
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3_faults import (
    Refuse,
)

SMALL = 5000


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore waits up to 20 s between attempts."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.01)
    monkeypatch.setattr("botocore.retries.quota.RetryQuota.acquire", lambda self, amount: True)


OPERATIONS: dict[str, Callable[[PayloadStore, random.Random], Any]] = {
    "put": lambda store, seed: store.put(seed.randbytes(SMALL)),
    "put a large one": lambda store, seed: store.put(seed.randbytes(9 * MIB)),
    "open": lambda store, seed: store.objects.open("k"),
    "info": lambda store, seed: store.objects.info("k"),
    "list": lambda store, seed: keys(store),
    "delete": lambda store, seed: store.objects.delete(["k"]),
    "read a document": lambda store, seed: store.objects.read_document("k"),
    "write a document": lambda store, seed: store.objects.write_document("k", b"x", expected=None),
    "replace a document": lambda store, seed: store.objects.replace_document("k", b"x"),
    "now": lambda store, seed: store.objects.now(),
    "abandoned uploads": lambda store, seed: store.objects.abandoned_uploads(0, remove=False),
}
SECRET = "a-secret-that-is-nowhere"


@pytest.mark.parametrize("operation", OPERATIONS)
class TestRefused:
    """Terminal, with S3's code and a remedy, and without a secret anywhere."""

    def refused(self, store: PayloadStore, operation: str, seed: random.Random, *secrets: str) -> str:
        logged: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: logged.append(handler.format(record))  # type: ignore[method-assign]
        logger = logging.getLogger("djp_dagster")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            with pytest.raises(PayloadStoreRefusedError) as caught:
                OPERATIONS[operation](store, seed)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        error = caught.value
        assert error.facts["uri"] == store.uri
        assert error.facts["code"]
        assert error.facts["code"] in str(error)
        told = [
            *("".join(traceback.format_exception(error)), repr(error), str(error), repr(error.facts)),
            *(repr(pickle.loads(pickle.dumps(error)).facts), *logged, repr(store), repr(store.objects)),
            *(repr(vars(store.objects)), repr(store.objects._client), repr(store.objects._client.settings)),  # type: ignore[attr-defined]
            str(store.objects._client.settings),  # type: ignore[attr-defined]
        ]
        for secret in secrets:
            assert not [text for text in told if secret in text]
        return str(error)

    def test_a_wrong_secret(self, s3: Place, seed: random.Random, operation: str) -> None:
        store = s3.at(s3.target, secret_access_key=SECRET, session_token=None).open()
        message = self.refused(store, operation, seed, SECRET)
        assert "check credentials" in message

    def test_a_wrong_key(self, s3: Place, seed: random.Random, operation: str) -> None:
        store = s3.at(s3.target, access_key_id="nobody", secret_access_key=SECRET).open()
        assert "check credentials" in self.refused(store, operation, seed, SECRET, "nobody")

    def test_no_bucket(self, s3: Place, seed: random.Random, operation: str) -> None:
        store = s3.at("s3://no-such-bucket-here/pre").open()
        if operation == "info":  # HEAD has no body to tell one from the other
            assert store.objects.info("k") is None
            return
        assert "create the bucket" in self.refused(store, operation, seed, s3.settings["secret_access_key"])

    def test_no_permission(self, faulty: Place, faulty_s3: FaultyS3, seed: random.Random, operation: str) -> None:
        faulty_s3.on(Refuse(403, "AccessDenied"), times=None)
        assert "grant s3:GetObject" in self.refused(
            faulty.open(), operation, seed, faulty.settings["secret_access_key"]
        )

    def test_not_implemented(self, faulty: Place, faulty_s3: FaultyS3, seed: random.Random, operation: str) -> None:
        faulty_s3.on(Refuse(501, "NotImplemented"), times=None)
        with pytest.raises(DjpError, match="501"):
            OPERATIONS[operation](faulty.open(), seed)

    def test_no_credentials(
        self, s3: Place, seed: random.Random, operation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        store = s3.at(s3.target, access_key_id=None, secret_access_key=None).open()
        assert "give credentials" in self.refused(store, operation, seed)


def test_some_objects_cannot_be_deleted(faulty: Place, faulty_s3: FaultyS3) -> None:
    """S3 tells it within an answer of success."""
    faulty_s3.on(Refuse(403, "AccessDenied"), kind="DeleteObjects", times=None)
    with pytest.raises(PayloadStoreRefusedError, match="s3:DeleteObject"):
        faulty.objects().delete(["a", "b"])


def test_nobody_listens(s3: Place, seed: random.Random) -> None:
    from tests.servers.ports import free_port

    store = s3.at(s3.target, endpoint_url=f"http://127.0.0.1:{free_port()}").open()
    for operation in OPERATIONS.values():
        with pytest.raises(PayloadStoreUnavailableError) as caught:
            operation(store, seed)
        assert s3.settings["secret_access_key"] not in "".join(traceback.format_exception(caught.value))
