"""What the S3 servers of the tests have in common: a process of their own, a client for them, fresh buckets."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.servers.guard import Guard, remove

REGION = "us-east-1"

_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
_KILL_SECONDS = 30.0


class S3Server(ABC):
    """One server on 127.0.0.1 with a folder of its own, which `close` removes.

    Guarantees that neither the process nor a file of it is left, however the tests end: see `Guard`.

    Attributes:
        port: Where it listens; the same after every start.
        access_key: Made up for this server, as is ``secret_key``.
    """

    name: str
    """What errors call it."""

    def __init__(self) -> None:
        self.access_key = f"test{secrets.token_hex(8)}"
        self.secret_key = secrets.token_hex(20)
        self.port = 0
        self._ports_are_settled = False
        self._process: subprocess.Popen[bytes] | None = None
        self._session: Any = None
        self._session_lock = threading.Lock()
        self._guard = Guard()
        self._home = Path(tempfile.mkdtemp(prefix="djp-s3-"))
        self._log = self._home / "server.log"

    @property
    def endpoint_url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs for its AWS clients to find this server and nothing else."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The id of the server's process."""
        if self._process is None or not self.running:
            raise RuntimeError(f"{self.name} is not running; call start() first")
        return self._process.pid

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it has stored something."""
        if self.running:
            return
        if self._ports_are_settled:
            self._launch()
            return
        for attempt in range(3):
            self._choose_ports()
            try:
                self._launch()
            except RuntimeError:  # another process may have been faster to a port
                if attempt == 2:
                    raise
            else:
                self._ports_are_settled = True
                return

    def stop(self) -> None:
        """Ask the server to end, and wait; kill it if it does not."""
        if self._process is None or not self.running:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._tidy()

    def kill(self) -> None:
        """SIGKILL, as when the machine runs out of memory."""
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(_KILL_SECONDS)
        self._tidy()

    def close(self) -> None:
        """End the server at once, and remove all it has stored."""
        try:
            self.kill()
        finally:
            remove([self._home, *self._sockets()])
            self._guard.close()

    def client(self, endpoint_url: str | None = None, **config: Any) -> Any:
        """A boto3 client with path-style addressing.

        Args:
            endpoint_url: Another way to the server, as through a proxy.
            config: Arguments of ``botocore.config.Config``.
        """
        return self._client("s3", endpoint_url, config)

    def new_bucket(self) -> str:
        """Create an empty bucket with a random name."""
        name = f"test-{uuid.uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return name

    @abstractmethod
    def drop_bucket(self, name: str) -> None:
        """Remove a bucket and all that is in it, unfinished uploads included."""

    def log_end(self) -> str:
        """The last lines the server wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])

    @abstractmethod
    def _choose_ports(self) -> None:
        """Set ``port``, and whatever else the server listens on, to ports that are free."""

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """What to execute."""

    @abstractmethod
    def _is_ready(self, log: str) -> bool:
        """Whether the server does its work. An OSError or an error of botocore means: not yet.

        Args:
            log: What the server has written since it was started.
        """

    def _sockets(self) -> Sequence[Path]:
        """The Unix sockets the server makes, outside its folder."""
        return ()

    def _client(self, service: str, endpoint_url: str | None, config: dict[str, Any]) -> Any:
        import boto3
        from botocore.config import Config

        # No proxy: the environment of the test run must not lead elsewhere.
        defaults = {"proxies": {}, "signature_version": "v4"}
        if service == "s3":
            defaults["signature_version"] = "s3v4"
            config = {**config, "s3": {"addressing_style": "path", **config.get("s3", {})}}
        with self._session_lock:  # a session reads the description of a service once; its clients are for any thread
            if self._session is None:
                self._session = boto3.session.Session()
            return self._session.client(
                service,
                endpoint_url=endpoint_url or self.endpoint_url,
                region_name=REGION,
                aws_access_key_id=self.access_key,
                aws_secret_access_key=self.secret_key,
                config=Config(**{**defaults, **config}),
            )

    def _launch(self) -> None:
        self._tidy()
        with self._log.open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(
                self._command(),
                cwd=self._home,
                # No configuration of the machine or the user, and nothing that measures coverage.
                env={"PATH": os.defpath, "HOME": str(self._home), "TMPDIR": str(self._home), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._guard.entrust(self._process.pid, [self._home, *self._sockets()])
            self._wait_until_ready(begin)
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self, begin: int) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        deadline = time.monotonic() + _START_SECONDS
        last: Exception | None = None
        while self.running and time.monotonic() < deadline:
            try:
                if self._is_ready(self._log.read_bytes()[begin:].decode(errors="replace")):
                    return
            except (OSError, BotoCoreError, ClientError) as error:
                last = error
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} did not start on port {self.port} ({last}); its log ends:\n{self.log_end()}")

    def _tidy(self) -> None:
        """After the process has ended: nothing of it is left but the folder."""
        remove(self._sockets())
        self._guard.entrust(None, [self._home])
