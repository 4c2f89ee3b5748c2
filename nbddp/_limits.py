"""What a system gives no more of, open files and processes: asked for before a run, and explained after it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import sys
import time

from nbddp import _process
from nbddp._errors import LaunchError

# Of the kernel's for each rank: its socket, its output, its pidfd and its log. And for a run: sockets to launcher and
# agent, selectors, the interrupt's pipe; what is opened for a moment, such as a folder that is deleted; and a few for
# what else happens in a kernel meanwhile.
_KERNEL_FILES = (4, 24)

# Of the agent's: a rank's pipes, queue and connection to the store; and what a process of torch's has open anyway.
# A rank inherits the former, and then has connections to all other ranks.
_AGENT_FILES = (5, 30)

# Processes and threads of the agent, and of a rank before its cell begins: its own two, and gloo's.
_AGENT_THREADS = 2
_RANK_THREADS = 5

# Seconds that the processes of the last run have to be gone, before those of the next are refused.
_LAST_RUN_SECONDS = 1.0

_MOST_LIKELY = "Most likely"

_RAISE_FILES = "raise the limit (ulimit -n) where the kernel is started"

_NO_FILES = (errno.EMFILE, errno.ENFILE)

_FILES_SAID = re.compile(re.escape(os.strerror(errno.EMFILE)))
_SEMAPHORE_SAID = re.compile(r"_multiprocessing\.SemLock\([\s\S]*Error: \[Errno \d+\] (.*)")
_PROCESSES_SAID = re.compile(r"can't start new thread|Thread creation failed")
# Sockets and locks say this as well; so it counts where a process or a thread was being started.
_TRY_AGAIN_SAID = re.compile(re.escape(os.strerror(errno.EAGAIN)))
_STARTS = re.compile(r"fork|Popen|[Tt]hread|Process|clone|\.start\(")


def check_files(ranks: int) -> None:
    """Refuse a run for which too few files may be opened, in this process or in the run's.

    Deep inside a process without descriptors torch hangs, imports are taken for missing modules, and nothing says why.

    Args:
        ranks: How many ranks there are to be; 0 if that is not known yet.

    Raises:
        LaunchError: There are too few.
    """
    limit = _limit(resource.RLIMIT_NOFILE)
    if limit is None:
        return
    here, there = (each * ranks + fixed for each, fixed in (_KERNEL_FILES, _AGENT_FILES))
    used = _open_in_all()
    if used is None or used + here > limit:
        used = _open_below(limit)
    what, them = ("a run", "it") if not ranks else ("1 rank", "it") if ranks == 1 else (f"{ranks} ranks", "them")
    fewer = "ask for fewer ranks, " if ranks > 1 else ""
    if used + here > limit:
        raise LaunchError(
            f"{what}: following {them} takes {here} more open files, and this process has {used} of the {limit} that "
            f"it may have. Close some, {fewer}or {_RAISE_FILES}"
        )
    if ranks and there > limit:
        raise LaunchError(
            f"{what}: running {them} takes {there} open files in one process, and a process may have {limit}. "
            f"Ask for fewer ranks, or {_RAISE_FILES}"
        )


def ranks_that_can_be_followed() -> int | None:
    """Return how many ranks this process may have files for; None if there is no limit."""
    limit = _limit(resource.RLIMIT_NOFILE)
    if limit is None:
        return None
    each, fixed = _KERNEL_FILES
    return max(0, (limit - _open_below(limit) - fixed) // each)


def check_processes(ranks: int) -> None:
    """Refuse a run for which too few processes and threads may be started.

    Where gloo gets some of its threads and not all, a rank aborts or hangs.

    Args:
        ranks: How many ranks there are to be.

    Raises:
        LaunchError: There are too few.
    """
    needed = _AGENT_THREADS + _RANK_THREADS * ranks
    deadline = time.monotonic() + _LAST_RUN_SECONDS
    while (lack := _lack_of_processes(needed)) is not None:
        if time.monotonic() >= deadline:
            what, them, fewer = (
                ("1 rank", "it", "") if ranks == 1 else (f"{ranks} ranks", "them", "ask for fewer ranks, ")
            )
            raise LaunchError(
                f"{what}: running {them} takes {needed} more processes and threads, and {lack}. "
                f"End some, {fewer}or raise the limit where the kernel is started"
            )
        time.sleep(0.05)


def _lack_of_processes(needed: int) -> str | None:
    """Return who has how many of how many processes and threads, if so many more are too many."""
    limit = _limit(resource.RLIMIT_NPROC) if hasattr(resource, "RLIMIT_NPROC") else None
    # Root is not held to it. And to count one's own takes milliseconds; mostly all that there are would fit.
    if limit is not None and os.getuid() != 0 and (_process.all_threads() or limit) + needed > limit:
        used = _process.threads_of_user()
        if used + needed > limit:
            return f"this user has {used} of the {limit} that it may have (ulimit -u)"
    of_container = _process.process_limit()
    if of_container is not None and of_container[0] + needed > of_container[1]:
        return f"this container has {of_container[0]} of the {of_container[1]} that it may have (pids.max)"
    return None


def _open_in_all() -> int | None:
    """Return how many descriptors are in use, where that can be had without counting them: Linux since 6.2."""
    try:
        return os.stat("/proc/self/fd").st_size or None
    except OSError:
        return None


def _open_below(limit: int) -> int:
    """Return how many descriptors below `limit` are in use."""
    try:
        # The listing has one of its own, which counts: it will be somebody else's.
        return sum(int(name) < limit for name in os.listdir("/dev/fd"))
    except OSError as error:
        return limit if error.errno in _NO_FILES else 0


def _limit(which: int) -> int | None:
    limit, _ = resource.getrlimit(which)
    return None if limit == resource.RLIM_INFINITY else limit


def is_about_files(error: BaseException) -> bool:
    """Tell whether an error says that no more files can be opened."""
    return isinstance(error, OSError) and error.errno in _NO_FILES


def no_more_files(what: str) -> str:
    """Return the message for something that failed since no more files could be opened.

    Args:
        what: What failed, such as "cannot start a run".
    """
    limit = _limit(resource.RLIMIT_NOFILE)
    may = "" if limit is None else f"; a process may have {limit}"
    return f"{what}: too many open files{may}. Close some, or {_RAISE_FILES}"


def no_more_processes(what: str) -> str:
    """Return the message for something that failed since no more processes or threads could be started."""
    may = []
    if hasattr(resource, "RLIMIT_NPROC") and (limit := _limit(resource.RLIMIT_NPROC)) is not None:
        may.append(f"this user may have {limit} (ulimit -u)")
    if (of_container := _process.process_limit()) is not None:
        may.append(f"this container may have {of_container[1]} (pids.max)")
    told = f": {' and '.join(may)}" if may else ""
    return (
        f"{what}: the system starts no more processes and threads{told}. "
        "End some, ask for fewer ranks, or raise the limit where the kernel is started"
    )


def explanation_of_error(said: str, traceback: str) -> str | None:
    """Return what a rank's exception most likely means, if its message tells of one of these limits."""
    return explanation(_MOST_LIKELY, said, starting=_STARTS.search(traceback) is not None)


def explanation(what: str, said: str, *, starting: bool = False) -> str | None:
    """Return the message for something that failed, if what was said about it tells of one of these limits.

    Args:
        what: What failed, such as "cannot start a run".
        said: What was said about it.
        starting: Whether a process or a thread was being started; if not, that may still be said.
    """
    if (found := _SEMAPHORE_SAID.search(said)) is not None and not _FILES_SAID.search(said):
        reason = found[1].lower()
        step = "Make room there" if reason == os.strerror(errno.ENOSPC).lower() else "Have a tmpfs there to write to"
        return f"{what}: it needs semaphores, whose place is /dev/shm, and can make none there: {reason}. {step}"
    if _FILES_SAID.search(said):
        return no_more_files(what)
    if _PROCESSES_SAID.search(said) or (_TRY_AGAIN_SAID.search(said) and (starting or _STARTS.search(said))):
        return no_more_processes(what)
    return None


def explanation_of_death(ranks: int, said: str) -> str | None:
    """Return what most likely ended a rank that could not say so itself, if it was one of these limits.

    C++ that can start no thread ends the process, and need not say why.

    Args:
        ranks: How many ranks the run had.
        said: The end of what the rank has printed.
    """
    if (explained := explanation(_MOST_LIKELY, said)) is not None:
        return explained
    limit = _limit(resource.RLIMIT_NPROC) if hasattr(resource, "RLIMIT_NPROC") else None
    if limit is not None and _process.threads_of_user() + ranks * _RANK_THREADS > limit:
        return no_more_processes(_MOST_LIKELY)
    return None


def share(pid: int) -> None:
    """Give another process this one's limits on open files and processes, which may have changed since it started."""
    if sys.platform == "linux":
        for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC):
            with contextlib.suppress(OSError, ValueError):  # it is gone; or a limit that only root may raise again
                resource.prlimit(pid, which, resource.getrlimit(which))
