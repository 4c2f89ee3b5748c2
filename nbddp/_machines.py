"""Several machines, on each of which the same is launched by hand: where they meet, and over which interface.

On one machine nothing of this is used: there, the ranks meet in a file, and talk over the loopback interface.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbddp._agent import Launch

# Seconds that this machine's agent waits for the others' at the end, and a little: torchrun's own exit barrier, to
# which one that has failed does not come.
END_SECONDS = 310.0

# Seconds after which a line says what is waited for at the end.
TELL_SECONDS = 3.0

WAITING_FOR_END = (
    "this machine's ranks are done; waiting for those of the other machines. An interrupt ends the wait, and loses "
    "nothing here"
)

_SIOCGIFADDR = 0x8915  # linux/sockios.h

_ENDPOINT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\s:\[\]]+)):(?P<port>\d{1,5})")


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``, or of ``[HOST]:PORT`` for an IPv6 address.

    Raises:
        ValueError: It is neither.
    """
    found = _ENDPOINT.fullmatch(text.strip())
    if found is None or not 0 < int(found["port"]) < 1 << 16:
        raise ValueError("that is not of the form HOST:PORT, as in node0:29500, with a port from 1 to 65535")
    return found["v6"] or found["host"], int(found["port"])


def waiting(launch: Launch) -> str:
    """Return what this machine waits for before its ranks start."""
    host, port = parse_endpoint(launch.rdzv_endpoint or "")
    others = [str(rank) for rank in range(launch.nnodes) if rank != launch.node_rank]
    listed = ", ".join(others[:8]) + (", …" if len(others) > 8 else "")
    machines = f"machine{'s' if len(others) > 1 else ''} {listed}"
    if launch.node_rank == 0:
        return (
            f"this is machine 0 of {launch.nnodes}, and waits at port {port} for {machines}. Is the same launched "
            f"there, with --nnodes {launch.nnodes} and a --node-rank of its own, and can {host}:{port} be reached?"
        )
    return (
        f"this is machine {launch.node_rank} of {launch.nnodes}, and waits at {host}:{port} for {machines}. Is the "
        f"same launched there, and is {host} the address of machine 0, at which port {port} can be reached?"
    )


def explanation(launch: Launch, words: Sequence[str]) -> str:
    """Return why a machine's agent has ended before it could start a rank.

    Args:
        launch: What the agent was asked for.
        words: What it said last.
    """
    port = parse_endpoint(launch.rdzv_endpoint or "")[1]
    if any("EADDRINUSE" in word for word in words):
        return (
            f"this is machine {launch.node_rank} of {launch.nnodes}, and port {port}, at which the others are to find "
            "it, is another program's. Choose another --rdzv-endpoint, on all machines"
        )
    said = f" It said: {words[-1]}" if words else ""
    return f"{waiting(launch)}{said}"


def interface_to(endpoint: str) -> str | None:
    """Return the network interface over which this machine reaches an endpoint; None if that cannot be told.

    gloo would take the interface that has the address of this machine's own name, which on many machines is one that
    no other can reach (127.0.1.1).

    Args:
        endpoint: ``HOST:PORT``; on the machine that HOST is, the interface that has the address.
    """
    if sys.platform != "linux":
        return None
    host, port = parse_endpoint(endpoint)
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as one:
                # Nothing is sent: it only has the system choose the way.
                one.connect(address)
                return _interface_of(family, one.getsockname()[0])
    return None


def _interface_of(family: int, address: str) -> str | None:
    """Return the interface that has an address."""
    if family == socket.AF_INET6:
        wanted = socket.inet_pton(family, address.partition("%")[0]).hex()
        with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as table:
            return next((line.split()[5] for line in table if line.startswith(wanted)), None)
        return None
    if address.startswith("127."):
        return "lo"
    import fcntl

    with socket.socket(family, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(one, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
