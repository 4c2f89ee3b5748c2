"""What of names, addresses and interfaces can keep ranks from finding each other; launches nothing that outlives it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

from nbddp import _devices
from nbddp._findings import Finding

_LOOPBACK_SECONDS = 1.0

# How long a process for a look-up may take to start, on a machine that is busy, before its question is dropped.
_START_SECONDS = 2.0

# A look-up waits in the C library, where no deadline reaches it; so it has a thread, and the process ends without it.
# The time is counted in short sleeps, which a machine that is busy makes longer, as it does the look-up.
_LOOK_UP = """
import os, socket, threading, time
def look():
    try:
        {}
    except OSError:
        pass
    os._exit(0)
threading.Thread(target=look, daemon=True).start()
for _ in range({}):
    time.sleep({})
os._exit({})
"""
_TICK = 0.01
_TOO_LATE = 3

# What torch's agent asks for when a run starts.
_HOST = """
        name = socket.gethostname()
        try:
            addresses = {info[4][0] for info in socket.getaddrinfo(name, None)}
            print(*sorted(addresses), flush=True)
        finally:
            socket.getfqdn(name)
"""

# How torch's store, which listens on IPv6 and IPv4 at once, asks for the name of who connects on loopback.
_PEER = "socket.getnameinfo(('::ffff:127.0.0.1', 80, 0, 0), socket.NI_NUMERICSERV)"


def host_name(seconds: float) -> Finding:
    """Look up what torch looks up: a name server that keeps silent makes its store, and other launchers, wait.

    nbddp's own process group needs no names.
    """
    name = socket.gethostname()
    began = time.monotonic()
    answers = _answers([_HOST, _PEER], seconds)
    took = time.monotonic() - began
    mend = "or mend the name servers in /etc/resolv.conf"
    if answers[0] is None:
        return Finding(
            "warn",
            "host name",
            f"looking up {name}, the name of this machine, takes longer than {seconds:g} s; nbddp's runs do not wait "
            "for that, cells that call init_process_group and other launchers may",
            f"Add the line '127.0.1.1 {name}' to /etc/hosts, {mend}",
        )
    if answers[1] is None:
        return Finding(
            "warn",
            "host name",
            f"looking up the name of ::ffff:127.0.0.1 takes longer than {seconds:g} s; cells that call "
            "init_process_group wait for that at each connection to torch's store",
            f"Add the line '::ffff:127.0.0.1 localhost' to /etc/hosts, {mend}",
        )
    if not (addresses := answers[0].split()):
        return Finding(
            "warn",
            "host name",
            f"{name}, the name of this machine, has no address; nbddp's runs need none, other launchers may",
            f"Add the line '127.0.1.1 {name}' to /etc/hosts",
        )
    return Finding("ok", "host name", f"{name} is {', '.join(addresses)}, found in {took:.1f} s; runs use loopback")


def _answers(questions: Sequence[str], seconds: float) -> list[str | None]:
    """Run each look-up in a Python of its own, all at once; return what they print, None for those that take too long.

    A look-up cannot be interrupted, and may take minutes; a process can be ended.

    Raises:
        TimeoutError: The processes did not even start in time.
    """
    children = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LOOK_UP.format(question, int(seconds / _TICK), _TICK, _TOO_LATE)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Jupyter's interrupt signals the kernel's whole group.
            start_new_session=True,
        )
        for question in questions
    ]
    deadline = time.monotonic() + seconds + _START_SECONDS
    try:
        said = [child.communicate(timeout=max(0.0, deadline - time.monotonic()))[0] for child in children]
        late = [child.returncode == _TOO_LATE for child in children]
        return [None if is_late else answer for is_late, answer in zip(late, said, strict=True)]
    except subprocess.TimeoutExpired:
        raise TimeoutError("the machine is too busy to start a process for it") from None
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def loopback() -> Finding:
    """Connect to this machine itself, as the ranks of a run do to each other."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_SECONDS),
        ):
            return Finding("ok", "loopback", "127.0.0.1 can be connected to")
    except OSError as error:
        return Finding(
            "bad",
            "loopback",
            f"ranks cannot reach each other at 127.0.0.1: {(error.strerror or str(error)).lower()}",
            f"As root: ip link set {_devices.LOOPBACK_INTERFACE} up",
        )


def interfaces(env: Mapping[str, str]) -> list[Finding]:
    """Look whether the network interfaces that gloo and NCCL are told to use are there."""
    there = [name for _, name in socket.if_nameindex()]
    found = []
    for variable, matches in (("GLOO_SOCKET_IFNAME", _gloo_has), ("NCCL_SOCKET_IFNAME", _nccl_has)):
        value = env.get(variable)
        if value and not matches(value, there):
            found.append(
                Finding(
                    "bad",
                    variable.partition("_")[0].lower(),
                    f"{variable}={value} names no network interface of this machine, which has {', '.join(there)}",
                    f"del os.environ[{variable!r}], and ranks use {_devices.LOOPBACK_INTERFACE}",
                )
            )
    return found


def _gloo_has(value: str, there: Iterable[str]) -> bool:
    """Tell whether there are all the interfaces that gloo is told to use: names, separated by commas."""
    # torch ignores a value of one character.
    return len(value) == 1 or set(value.split(",")) <= set(there)


def _nccl_has(value: str, there: Iterable[str]) -> bool:
    """Tell whether there is an interface that NCCL is told to use: prefixes; names behind "="; all but these: "^"."""
    names = tuple(value.lstrip("^=").split(","))
    if value.startswith("^="):
        return any(name not in names for name in there)
    if value.startswith("^"):
        return any(not name.startswith(names) for name in there)
    if value.startswith("="):
        return any(name in names for name in there)
    return any(name.startswith(names) for name in there)
