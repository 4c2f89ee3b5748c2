"""Whether the processes at the other ends of a rank's connections are the user's own.

gloo takes whoever connects to its port, and says the right number, for the rank that it waits for; numbers are easily
guessed, and ports are listed for every user of the machine. Linux lists for each connection whose it is, too. So once
a group is connected, and before anything is sent through it, a rank looks.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from nbddp import _process


class StrangerError(PermissionError):
    """A process of another user has connected to this rank."""


def refuse_strangers() -> None:
    """Look at the other ends of this process's TCP connections, as far as they are on this machine.

    Raises:
        StrangerError: One of them is not this user's.
    """
    if strangers := _strangers():
        _process.hang_up()
        raise StrangerError(
            f"a process of another user (uid {', '.join(map(str, sorted(strangers)))}) has connected to this rank in "
            "place of one of its peers. The connections were closed before anything was sent; find out who that is on "
            "this machine"
        )


def _strangers() -> set[int]:
    ours = {(b, a) for a, b in (_ends(held) for _, held in _process.connections()) if a and b}
    if not ours:
        return set()
    try:
        table = Path("/proc/net/tcp").read_text()
    except OSError:  # not Linux
        return set()
    me = os.getuid()
    found = set()
    for line in table.splitlines()[1:]:
        _, local, remote, _, _, _, _, uid, _, inode, *_ = line.split()
        # A connection that its process has closed already is nobody's.
        if (local, remote) in ours and inode != "0" and int(uid) != me:
            found.add(int(uid))
    return found


def _ends(connection: socket.socket) -> tuple[str, str]:
    """Return both addresses of an IPv4 connection as the system lists them; empty strings if it has none."""
    try:
        ends = connection.getsockname(), connection.getpeername()
    except OSError:  # it listens
        return "", ""
    if connection.family != socket.AF_INET:
        return "", ""
    first, second = (f"{int.from_bytes(socket.inet_aton(ip), sys.byteorder):08X}:{port:04X}" for ip, port in ends)
    return first, second
