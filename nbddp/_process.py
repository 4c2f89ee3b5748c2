"""What nbddp asks of the operating system: who dies with whom, who is whose child, what there is to use.

Everything here works on Linux. Where another system has no equivalent the function says so by its return value and
its caller falls back; nothing here raises for a missing feature.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# Seconds until what SIGKILL does not end, since the kernel does not let it go, is left to itself.
_KILL_SECONDS = 2.0

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


def told_of_parents_death(parent: int, signum: int = signal.SIGTERM) -> Callable[[], None]:
    """Return what, called in a child between fork and exec, has it end politely when the thread that forked it ends.

    Args:
        parent: The parent's pid.
        signum: The signal that it gets.
    """

    def request() -> None:
        if sys.platform == "linux":
            _libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

    return request


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


def exit_status(pid: int) -> int | None:
    """Return how a process has ended that its parent has not yet taken note of: a status, or minus a signal."""
    try:
        stat = Path("/proc", str(pid), "stat").read_bytes()
        fields = stat[stat.rindex(b")") + 2 :].split()
        # The third field of all is the first here; the last but one, the 52nd, is what wait() will return.
        return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] == b"Z" else None
    except (OSError, ValueError, IndexError):  # gone, or a system without such files
        return None


def has_ended(pid: int) -> bool:
    """Tell whether a process has ended, whether or not its parent has taken note."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return exit_status(pid) is not None


def send_signal(pid: int, pidfd: int | None, signum: int) -> None:
    """Signal a process; by `pidfd` where there is one, since its pid may have been given to another meanwhile."""
    try:
        if pidfd is not None and sys.platform == "linux":
            signal.pidfd_send_signal(pidfd, signum)
        else:
            os.kill(pid, signum)
    except ProcessLookupError:
        pass


def _is_readable(fd: int) -> bool:
    # Not select, which knows numbers below 1024 only.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def signal_main_thread(pid: int, pidfd: int | None, signum: int) -> None:
    """Signal a process so that its main thread is the one to handle it.

    A signal sent to a process as a whole may be delivered to any of its threads. Python raises KeyboardInterrupt in
    the main thread only, and does not wake it for a signal that a thread of gloo's or NCCL's has caught: a main thread
    that sleeps would sleep on.
    """
    if hasattr(_libc, "tgkill"):
        # By pid, so see first that it is still the same process; its parent cannot have reaped it in between.
        if pidfd is not None and _is_readable(pidfd):
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


def children_of(pid: int) -> set[int]:
    """Return the pids of another process's children; none where the system does not tell."""
    found: set[int] = set()
    for thread in Path("/proc", str(pid), "task").glob("*"):
        with contextlib.suppress(OSError):  # it ends this moment
            found |= {int(child) for child in (thread / "children").read_text().split()}
    return found


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


def kill_marked(variable: str, value: str) -> None:
    """Send SIGKILL to all processes that `marked` finds, until it finds none: one may have forked just before."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (pids := marked(variable, value)) and time.monotonic() < deadline:
        kill_all(pids)
        time.sleep(0.005)


def hang_up() -> None:
    """Close every TCP connection of this process, as its exit would, also those that live objects still hold.

    A rank that has ended lives on until torchrun lets it go. Others that wait for it in a collective are to see it
    leave, not to wait as long.
    """
    # To it nobody ever sends anything.
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    silent.setblocking(False)
    for fd, _ in connections():
        # Not shut down: gloo's thread, which waits on it, would take that for an error and abort. And not closed: its
        # number must not become another file's while there are objects that hold it. Nor /dev/null: gloo aborts, too,
        # if it comes to wait for what cannot be waited for.
        os.dup2(silent.fileno(), fd)
    silent.close()


def break_off() -> None:
    """Tell the other end of every TCP connection of this process that no more will come.

    Whoever waits there for data of ours gets an error; and we get one from there, once it leaves.
    """
    for _, connection in connections():
        with contextlib.suppress(OSError):  # it is not connected
            connection.shutdown(socket.SHUT_WR)


def connections() -> Iterator[tuple[int, socket.socket]]:
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
        room = min(room, _room(group, "memory.max", "memory.current", "inactive_file"))
    # Version 1 of cgroups; "no limit" is a very large one there.
    for group in {Path("/sys/fs/cgroup/memory"), _own_cgroup("memory")}:
        names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        room = min(room, _room(group, *names))
    return max(room, 0)


def _room(group: Path, limit: str, usage: str, cached: str) -> int:
    """Return how many bytes a cgroup leaves; a very large number if it sets no limit."""
    try:
        most, used = (int((group / name).read_text()) for name in (limit, usage))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such limit ("max"), or another version
        return sys.maxsize
    # Cached files give way.
    return most - used + int(stat.get(cached, 0))


def process_limit() -> tuple[int, int] | None:
    """Return how many processes and threads this process's cgroup has, and may have; None if it sets no limit.

    Of the limits on the way to the root, the one that leaves least.
    """
    found = []
    for root, own in ((Path("/sys/fs/cgroup"), _own_cgroup()), (Path("/sys/fs/cgroup/pids"), _own_cgroup("pids"))):
        # In a container the path may be the host's; its own limits are then at the root that it sees.
        for group in {root, own, *own.parents}:
            with contextlib.suppress(OSError, ValueError):  # "max", or no such file
                limit = int((group / "pids.max").read_text())
                found.append((int((group / "pids.current").read_text()), limit))
    return min(found, key=lambda pair: pair[1] - pair[0], default=None)


def threads_of_user() -> int:
    """Return how many threads this user's processes have, as far as they can be seen."""
    me = os.getuid()
    count = 0
    for entry in os.listdir("/proc") if Path("/proc").is_dir() else ():
        if entry.isdigit():
            with contextlib.suppress(OSError):  # gone
                if os.stat(f"/proc/{entry}").st_uid == me:
                    count += os.stat(f"/proc/{entry}/task").st_nlink - 2
    return count


def oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory, as far as this process can see.

    Counts the whole machine and this process's cgroup; only a rise between two calls means anything.
    """
    total = 0
    for path in _oom_counters():
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if (found := _OOM_KILL.search(file.read())) is not None:
                total += int(found[1])
    return total


_OOM_KILL = re.compile(rb"^oom_kill (\d+)$", re.MULTILINE)


@functools.cache
def _oom_counters() -> tuple[str, ...]:
    """Return the files that count them; each cell reads them twice."""
    paths = (
        Path("/proc/vmstat"),
        Path("/sys/fs/cgroup/memory.events"),
        _own_cgroup() / "memory.events",
        _own_cgroup("memory") / "memory.oom_control",
    )
    return tuple(str(path) for path in paths if path.exists())


def all_threads() -> int:
    """Return how many processes and threads there are in all; 0 where that cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    return 0


def _own_cgroup(controller: str = "") -> Path:
    """Return this process's cgroup directory, or a path that does not exist.

    Args:
        controller: One of version 1, such as "pids"; empty for version 2, where there is one directory for all.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return Path("/sys/fs/cgroup", controller, path.lstrip("/"))
    return Path("/sys/fs/cgroup/-")
