"""Whether the processes at the other ends of a rank's connections are the user's own.

gloo takes whoever connects to its port, and says the right number, for the rank that it waits for; numbers are easily
guessed, and ports are listed for every user of the machine. Linux lists for each connection whose it is, too. So once
a group is connected, and before anything is sent through it, a rank looks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

from nbddp import _process


class StrangerError(PermissionError):
    """A process of another user has connected to this rank."""


# Both ends of a TCP connection as the system lists them: this process's, and the other.
Connection = tuple[str, str]

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def connections() -> set[Connection]:
    """Return this process's TCP connections."""
    return {ends for _, held in _process.connections() if (ends := _ends(held)) is not None}


def refuse_strangers(new: set[Connection]) -> None:
    """Look at the other ends of connections, as far as they are on this machine.

    Args:
        new: Those that were made for a process group. Others may well lead to another user: to a database, say.

    Raises:
        StrangerError: One of them is not this user's.
    """
    if strangers := _strangers(new):
        _process.hang_up()
        raise StrangerError(
            "another user's process is at the other end of a connection that this rank's process group has made: "
            f"{', '.join(f'uid {uid} at {_port(end)}' for uid, end in sorted(strangers))}. All were closed before "
            "anything was sent. On this machine, ss -tpn shows who has which port"
        )


def _strangers(new: set[Connection]) -> set[tuple[int, str]]:
    """Return uid and address of those at the other end who are not this user."""
    ours = {(remote, local) for local, remote in new}
    me = os.getuid()
    found = set()
    for path in _TABLES if ours else ():
        with contextlib.suppress(OSError):  # not Linux, or no IPv6
            for line in Path(path).read_text().splitlines()[1:]:
                _, local, remote, _, _, _, _, uid, _, inode, *_ = line.split()
                # A connection that its process has closed already is nobody's.
                if (local, remote) in ours and inode != "0" and int(uid) != me:
                    found.add((int(uid), local))
    return found


def _ends(connection: socket.socket) -> Connection | None:
    try:
        ends = connection.getsockname(), connection.getpeername()
    except OSError:  # it listens
        return None
    first, second = (_listed(connection.family, address[0], address[1]) for address in ends)
    return first, second


def _listed(family: int, address: str, port: int) -> str:
    """Return an address as the system lists it: words of four bytes, as numbers."""
    raw = socket.inet_pton(family, address.partition("%")[0])
    words = [int.from_bytes(raw[i : i + 4], sys.byteorder) for i in range(0, len(raw), 4)]
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"


def _port(end: str) -> str:
    return f"port {int(end.rpartition(':')[2], 16)}"
