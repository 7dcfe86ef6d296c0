"""The user service: who asks for a user by HTTP gets the address that is known at that moment. One process of the shop.

``GET /users/<id>`` and ``GET /users?ids=a,b`` answer JSON; 404 if nobody has that id. It is a service like others: it
takes some milliseconds, and one answer in a hundred is 503.
"""

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import click

import djp_dagster as djp
from definitions import user_updates
from djp_dagster.processing.stopping import SignalledEvent

_LATENCY_S = 0.003
_UNAVAILABLE = 0.01
_LOOK_EVERY_S = 0.2


class Addresses:
    """What the service knows: the latest update of each user, read from the stream again and again."""

    def __init__(self, stream: djp.EventStream) -> None:
        stream.create_topic(user_updates)
        self._stream = stream
        self._read_to = dict.fromkeys(range(user_updates.partitions), 0)
        self.known: dict[str, tuple[int, str | None]] = {}

    def look(self) -> None:
        """Take in what is new."""
        for partition, start in self._read_to.items():
            for update in self._stream.records(user_updates, partition, start):
                user_id, version = update.data["user_id"], update.data["version"]
                if version >= self.known.get(user_id, (-1, None))[0]:
                    self.known[user_id] = (version, update.data["email"])
                self._read_to[partition] = update.offset + 1

    def find(self, user_id: str) -> dict[str, object] | None:
        """The user, if anybody has that id."""
        found = self.known.get(user_id)
        return None if found is None else {"id": user_id, "email": found[1]}

    def follow(self, stop: threading.Event) -> None:
        """Look until told to stop; an outage of the stream is waited for."""
        while not stop.wait(_LOOK_EVERY_S):
            try:
                self.look()
            except djp.TransientError as error:
                click.echo(f"waiting for the stream: {error}", err=True)


def server(addresses: Addresses, listening: socket.socket) -> ThreadingHTTPServer:
    """The service on a socket that listens already."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            time.sleep(_LATENCY_S)
            if random.random() < _UNAVAILABLE:  # noqa: S311
                self._answer(503, {"error": "try again"}, {"Retry-After": "0"})
                return
            url = urlsplit(self.path)
            if url.path == "/users":
                ids = parse_qs(url.query).get("ids", [""])[0].split(",")
                self._answer(200, [user for user in map(addresses.find, ids) if user is not None])
                return
            user = addresses.find(unquote(url.path.removeprefix("/users/")))
            self._answer(404 if user is None else 200, user or {"error": "no such user"})

        def _answer(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Requests are not worth a line each."""

    made = ThreadingHTTPServer(listening.getsockname(), Handler, bind_and_activate=False)
    made.socket.close()
    made.socket, (_, made.server_port) = listening, listening.getsockname()
    return made


@click.command(help="Answer who asks for users of the shop, until stopped.")
@click.option("--listening", type=int, required=True, help="The number of an inherited socket.")
def main(listening: int) -> None:
    """Run until SIGINT or SIGTERM."""
    stop = SignalledEvent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with djp.SqlEventStream().open() as stream:
        addresses = Addresses(stream)
        addresses.look()
        service = server(addresses, socket.socket(fileno=listening))
        threading.Thread(target=service.serve_forever, daemon=True).start()
        click.echo(f"serving users on port {service.server_port}, process {os.getpid()}")
        addresses.follow(stop)
        service.shutdown()
        service.server_close()


if __name__ == "__main__":
    main()
