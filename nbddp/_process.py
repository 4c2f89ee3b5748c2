"""What nbddp asks of the operating system: who dies with whom, who is whose child, what there is to use.

Everything here works on Linux. Where another system has no equivalent the function says so by its return value and
its caller falls back; nothing here raises for a missing feature.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# Loaded once, in the launcher: dlopen in every forked rank would cost a fifth of a millisecond each.
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Have the kernel send this process SIGKILL when the thread that forked it ends.

    Args:
        parent: The parent's pid as read before the fork. If it is gone already the process exits at once: the
            signal is only sent for deaths that come after the request.
    """
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def become_subreaper() -> None:
    """Make orphaned descendants this process's own children, so that it can find and end them."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when `pid` ends, or None where the system has none."""
    opener = getattr(os, "pidfd_open", None)
    if opener is None:
        return None
    try:
        return int(opener(pid))
    except OSError:
        return None


def send_signal(pid: int, pidfd: int | None, signum: int) -> None:
    """Signal a process; by `pidfd` where there is one, since its pid may have been given to another meanwhile."""
    try:
        if pidfd is not None and sys.platform == "linux":
            signal.pidfd_send_signal(pidfd, signum)
        else:
            os.kill(pid, signum)
    except ProcessLookupError:
        pass


def signal_main_thread(pid: int, pidfd: int | None, signum: int) -> None:
    """Signal a process so that its main thread is the one to handle it.

    A signal sent to a process as a whole may be delivered to any of its threads. Python raises KeyboardInterrupt in
    the main thread only, and does not wake it for a signal that a thread of gloo's or NCCL's has caught: a main thread
    that sleeps would sleep on.
    """
    if hasattr(_libc, "tgkill"):
        # By pid, so see first that it is still the same process; its parent cannot have reaped it in between.
        if pidfd is not None and select.select([pidfd], [], [], 0)[0]:
            return
        _libc.tgkill(pid, pid, signum)
    else:
        send_signal(pid, pidfd, signum)


def _parents() -> Iterator[tuple[int, int]]:
    """Yield (pid, parent's pid) of every process that can be seen."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_bytes()
            except OSError:
                continue
            # The command in parentheses may hold anything, a closing parenthesis included.
            yield int(entry), int(stat[stat.rindex(b")") + 2 :].split(None, 2)[1])


def children() -> list[int]:
    """Return the pids of this process's own children, adopted orphans included."""
    me = os.getpid()
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{me}/children").read_text().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN, or no /proc
        return [pid for pid, parent in _parents() if parent == me] if Path("/proc").is_dir() else []


def marked(variable: str, value: str) -> list[int]:
    """Return the pids of this user's processes that were started with `variable` set to `value`.

    Reads the environment that a process was executed with, which forked children share with their parent.
    """
    needle = f"{variable}={value}".encode()
    found = []
    for entry in os.listdir("/proc") if Path("/proc").is_dir() else ():
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                environ = Path("/proc", entry, "environ").read_bytes()
            except OSError:  # another user's, or gone
                continue
            if needle in environ.split(b"\0"):
                found.append(int(entry))
    return found


def kill_all(pids: list[int]) -> None:
    """Send SIGKILL to each of `pids`."""
    for pid in pids:
        send_signal(pid, None, signal.SIGKILL)


def hang_up() -> None:
    """Close every TCP connection of this process, as its exit would, also those that live objects still hold.

    A rank that has ended lives on until torchrun lets it go. Others that wait for it in a collective are to see it
    leave, not to wait as long.
    """
    # To it nobody ever sends anything.
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    silent.setblocking(False)
    for fd, _ in _connections():
        # Not shut down: gloo's thread, which waits on it, would take that for an error and abort. And not closed: its
        # number must not become another file's while there are objects that hold it. Nor /dev/null: gloo aborts, too,
        # if it comes to wait for what cannot be waited for.
        os.dup2(silent.fileno(), fd)
    silent.close()


def break_off() -> None:
    """Tell the other end of every TCP connection of this process that no more will come.

    Whoever waits there for data of ours gets an error; and we get one from there, once it leaves.
    """
    for _, connection in _connections():
        with contextlib.suppress(OSError):  # it is not connected
            connection.shutdown(socket.SHUT_WR)


def _connections() -> Iterator[tuple[int, socket.socket]]:
    """Yield this process's TCP sockets: descriptor, and an object that is closed afterwards."""
    for entry in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # listdir's own descriptor, gone by now
            if stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                with socket.socket(fileno=os.dup(int(entry))) as held:
                    if held.family in (socket.AF_INET, socket.AF_INET6) and held.type == socket.SOCK_STREAM:
                        yield int(entry), held


def usable_cores() -> int:
    """Return how many cores this process may use: its CPU affinity, and its container's quota if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(cores, quota) if quota else cores)


def _cpu_quota() -> int | None:
    """Return the whole cores that the cgroup grants, rounded up, or None if it sets no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit():  # "max" in version 2, "-1" in version 1
        return None
    return max(1, -(-int(quota) // int(period)))


def available_memory() -> int:
    """Return how many bytes of memory can still be had: the machine's, or what the container's limit leaves if less."""
    room = sys.maxsize
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        room = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    for group in {Path("/sys/fs/cgroup"), _own_cgroup()}:
        with contextlib.suppress(OSError, ValueError):  # no such limit ("max"), or another version
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Cached files give way.
            room = min(room, limit - used + int(stat.get("inactive_file", 0)))
    return max(room, 0)


def oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory, as far as this process can see.

    Counts the whole machine and this process's cgroup; only a rise between two calls means anything.
    """
    total = 0
    for path in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"), _own_cgroup() / "memory.events"):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return total


def most_processes() -> int | None:
    """Return how many processes and threads this process's cgroup may have, or None if it sets no limit."""
    for path in (_own_cgroup() / "pids.max", Path("/sys/fs/cgroup/pids.max"), Path("/sys/fs/cgroup/pids/pids.max")):
        with contextlib.suppress(OSError, ValueError):  # there is none; or it is "max"
            return int(path.read_text())
    return None


def own_threads() -> int:
    """Return how many threads this user's processes have; 0 where that cannot be told."""
    total = 0
    for entry in os.listdir("/proc") if Path("/proc").is_dir() else ():
        # One that is gone meanwhile has none; and a container need not show everybody's.
        with contextlib.suppress(OSError, ValueError):
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == os.getuid():
                stat = Path("/proc", entry, "stat").read_bytes()
                total += int(stat[stat.rindex(b")") + 2 :].split(None, 18)[17])
    return total


def _own_cgroup() -> Path:
    """Return this process's cgroup directory (version 2), or a path that does not exist."""
    try:
        line = Path("/proc/self/cgroup").read_text().splitlines()[-1]
    except (OSError, IndexError):
        return Path("/sys/fs/cgroup/-")
    return Path("/sys/fs/cgroup", line.rpartition(":")[2].lstrip("/"))
