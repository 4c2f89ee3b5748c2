"""What of the machine and of the notebook's environment can keep ranks from starting, or from ending.

Each check looks at one thing, launches nothing and returns what it found. None imports torch or touches a GPU. Their
order, and what becomes of what they find, is `nbddp._doctor`'s.
"""

from __future__ import annotations

import os
import resource
import stat
import sys
import tempfile
from collections.abc import Iterable, Mapping

from nbddp import _devices, _limits, _process
from nbddp._findings import Finding, count
from nbddp._paths import format_size

_SHM = "/dev/shm"

# Room below which a line says so, in bytes. Docker gives a container 64 MB of /dev/shm; logs keep every byte that ranks
# print; a rank with its libraries takes some hundred megabytes of its own before the first tensor.
_SHM_BYTES = 1_000_000_000
_TEMP_BYTES = 1_000_000_000
_RANK_BYTES = 500_000_000
_TEMP_FILES = 10_000

# What most systems allow: DataLoader workers hold a descriptor for each tensor that they send.
_USUAL_FILES = 1024

# Of a rank, with the threads of OpenMP, autograd, gloo, NCCL and a few DataLoader workers.
_THREADS_PER_RANK = 64

# In these a rank cannot even start: the agent's and its own few threads.
_THREADS_TO_START = 16

# What a run, or a library that it uses, reads from the environment when it starts.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_BEHAVIOUR = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_DEBUG", "CUDA_LAUNCH_BLOCKING")


# Room.


def shared_memory() -> Finding | None:
    """Look at the memory that processes share: NCCL's, DataLoader's, and nbddp's for what a cell uses."""
    if not sys.platform.startswith("linux"):
        return None
    info = os.statvfs(_SHM)
    total, free = info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize
    if free >= _SHM_BYTES:
        return Finding("ok", _SHM, f"{format_size(free)} free")
    text = f"{format_size(free)} free of {format_size(total)}; NCCL and DataLoader workers die or hang when it is full"
    if total < _SHM_BYTES:
        return Finding("warn", _SHM, text, "Start the container with --shm-size=8g or --ipc=host")
    return Finding("warn", _SHM, text, f"Delete what ended processes have left there: ls -l {_SHM}")


def temp_space() -> list[Finding]:
    """Look at the folder for temporary files: its room, and who may write there."""
    subject = "temp space"
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        return [
            Finding(
                "bad",
                subject,
                f"no folder for temporary files can be written; TMPDIR={os.environ.get('TMPDIR', '')!r}",
                "Set TMPDIR to one that can and restart the kernel",
            )
        ]
    elsewhere = "Make room there, or set TMPDIR to another folder and restart the kernel"
    info = os.statvfs(folder)
    free = info.f_bavail * info.f_frsize
    # Some file systems have no fixed number of files, and say 0.
    files = info.f_favail if info.f_files else sys.maxsize
    found = []
    if not os.access(folder, os.W_OK | os.X_OK):
        found.append(Finding("bad", subject, f"{folder} cannot be written", elsewhere))
    if files < _TEMP_FILES:
        found.append(Finding("warn", subject, f"room for only {files} more files in {folder}", elsewhere))
    if free < _TEMP_BYTES:
        found.append(Finding("warn", subject, f"{format_size(free)} free in {folder}", elsewhere))
    mode = os.stat(folder).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        found.append(
            Finding(
                "warn",
                subject,
                f"{folder} has mode {stat.S_IMODE(mode):04o}: whoever has an account here can replace nbddp's files",
                f"chmod +t {folder}, or set TMPDIR to a folder of your own and restart the kernel",
            )
        )
    return found or [Finding("ok", subject, f"{format_size(free)} free in {folder}")]


def memory(ranks: int) -> Finding:
    """Look at the memory that can be had, that of the container included."""
    available = _process.available_memory()
    if available == sys.maxsize:
        return Finding("ok", "memory", "this system does not say how much there is")
    text = f"{format_size(available)} available"
    if available >= ranks * _RANK_BYTES:
        return Finding("ok", "memory", text)
    return Finding(
        "warn",
        "memory",
        f"{text}, and {count(ranks, 'rank')} can need {format_size(ranks * _RANK_BYTES)} before any data",
        "When there is none left the system kills a rank: free some, or ask for fewer ranks",
    )


# Limits.


def open_files(ranks: int) -> Finding:
    """Look at how many files the kernel, and with it every rank, may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _limits.ranks_that_can_be_followed()
    if enough is None:
        return Finding("ok", "open files", "no limit")
    is_open = len(os.listdir("/dev/fd")) - 1
    text = f"{limit} at once, {is_open} open now: enough to follow {count(enough, 'rank')}"
    advice = "ulimit -n 4096 where the kernel is started"
    if enough < ranks:
        return Finding("bad", "open files", text, advice)
    if limit < _USUAL_FILES:
        return Finding("warn", "open files", f"{text}, but few for DataLoader workers", advice)
    return Finding("ok", "open files", text)


def processes(ranks: int) -> Finding:
    """Look at how many more processes and threads this user, and this container, may start."""
    rooms = []
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if limit != resource.RLIM_INFINITY and os.getuid() != 0:  # root is not held to it
        used = _process.threads_of_user()
        rooms.append((limit - used, f"{used} of {limit} in use (ulimit -u)", "Raise ulimit -u"))
    if group := _process.process_limit():
        used, limit = group
        rooms.append((limit - used, f"{used} of {limit} in use (the container's pids limit)", "Raise that limit"))
    if not rooms:
        return Finding("ok", "processes", "no limit")
    room, text, raise_it = min(rooms)
    text = f"{max(room, 0)} more can be started, threads included; {text}"
    if room >= ranks * _THREADS_PER_RANK:
        return Finding("ok", "processes", text)
    return Finding(
        "bad" if room < ranks * _THREADS_TO_START else "warn",
        "processes",
        text,
        f"{count(ranks, 'rank')} can need {ranks * _THREADS_PER_RANK}, DataLoader workers included. "
        f"{raise_it}, or end processes that are not needed",
    )


def other_limits() -> list[Finding]:
    """Look at the limits that only matter to some."""
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    address, _ = resource.getrlimit(resource.RLIMIT_AS)
    adapters = os.listdir("/sys/class/infiniband") if os.path.isdir("/sys/class/infiniband") else []
    if locked == resource.RLIM_INFINITY:
        found = [Finding("ok", "locked memory", "no limit")]
    elif adapters:
        found = [
            Finding(
                "warn",
                "locked memory",
                f"{format_size(locked)}; InfiniBand, which is here ({', '.join(sorted(adapters))}), needs more",
                "ulimit -l unlimited where the kernel is started; --ulimit memlock=-1 for a container",
            )
        ]
    else:
        found = [
            Finding("ok", "locked memory", f"{format_size(locked)}; only InfiniBand needs more, and there is none")
        ]
    written = "not written (ulimit -c 0)" if core == 0 else "written when a rank crashes, with all of its memory"
    found.append(Finding("ok", "core files", written))
    if address != resource.RLIM_INFINITY:
        found.append(
            Finding(
                "warn",
                "address space",
                f"{format_size(address)}; CUDA reserves far more than it uses, and fails",
                "ulimit -v unlimited where the kernel is started",
            )
        )
    return found


def cores(env: Mapping[str, str], ranks: int) -> Finding:
    """Look at the cores that may be used, and how many threads ranks would compute with."""
    usable, there = _process.usable_cores(), os.cpu_count() or 1
    text = count(usable, "core")
    if usable < there:
        text += f" of the machine's {there} (affinity, or the container's quota)"
    given = env.get("OMP_NUM_THREADS")
    if given is None:
        shares = [f"{_devices.threads_per_rank(n)} for each of {count(n, 'rank')}" for n in sorted({2, ranks})]
        return Finding("ok", "cores", f"{text}; threads: {', '.join(shares)}")
    text += f"; OMP_NUM_THREADS={given}"
    advice = "Without OMP_NUM_THREADS ranks share the cores evenly"
    try:
        threads = int(given.split(",")[0])
    except ValueError:
        return Finding("bad", "cores", f"{text} is no number of threads", advice)
    if ranks * threads > max(usable, ranks):
        return Finding("warn", "cores", f"{text}, for each of {count(ranks, 'rank')}, is more than there are", advice)
    return Finding("ok", "cores", f"{text} for each rank")


# The environment.


def left_over(env: Mapping[str, str]) -> Finding | None:
    """Look for what a launcher has left in the notebook's own environment."""
    if not (names := [name for name in _LAUNCHED if name in env]):
        return None
    return Finding(
        "warn",
        "environment",
        f"{_set(names, env)}: ranks get torchrun's own, but in the notebook itself libraries take these for a "
        "launched run, and wait for its other ranks",
        f"If nobody needs them: for name in {names!r}: del os.environ[name]",
    )


def behaviour(env: Mapping[str, str]) -> list[Finding]:
    """List the variables that change what NCCL, gloo and torch do."""
    names = sorted(name for name in env if name.startswith(_BEHAVIOUR))
    slow = {"CUDA_LAUNCH_BLOCKING": {"1"}, "TORCH_DISTRIBUTED_DEBUG": {"DETAIL"}}
    slowing = [name for name in names if env[name].upper() in slow.get(name, ())]
    found = []
    if slowing:
        found.append(
            Finding("warn", "environment", f"{_set(slowing, env)} makes training slower", "It is for debugging only")
        )
    if rest := [name for name in names if name not in slowing]:
        found.append(Finding("ok", "environment", f"ranks get {_set(rest, env)}"))
    return found


def _set(names: Iterable[str], env: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={env[name]}" for name in names)
