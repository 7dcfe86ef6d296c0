"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import random
import socket

# Below the range from which Linux gives ports to outgoing connections: a port found here stays free while
# its server is down between a stop and a restart.
_PORTS = range(15_000, 32_000)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    draw = random.SystemRandom()
    for _ in range(200):
        port = draw.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"no free port found in {_PORTS}")
