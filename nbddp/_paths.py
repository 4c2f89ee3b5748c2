"""Where nbddp keeps files: one directory for a session (a kernel), one in it for each run.

Both are for their owner's eyes only (mode 0700). A session holds a lock on its directory for as long as its process
lives, so that another can tell a live session from what a killed kernel left behind. The lock is the truth, not the
pid in the name: with a shared temporary directory the pid may belong to another container.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from nbddp import _limits, _process
from nbddp._errors import LaunchError

if TYPE_CHECKING:
    from nbddp._log_files import Logs

_PREFIX = "nbddp-"
_SHM = "/dev/shm"
_LOCK = "lock"

# Seconds after which a session directory without its lock file is a ruin, not one being made.
_HALF_MADE = 3600

# How often the deletion of a directory is tried, and seconds in between.
_REMOVE_TIMES, _REMOVE_SECONDS = 10, 0.02

# What is left free in memory-backed storage: a container whose /dev/shm is full to the last page breaks DataLoader.
_SHM_RESERVE = 64 << 20

# What has so few bytes is not worth the milliseconds that it takes to learn how much memory there is.
_LITTLE = 1 << 20


class RunDir:
    """Every path of one run. Exists from the capture of the cell until all its processes are gone."""

    def __init__(self, root: str, *, shm: str | None = None) -> None:
        self.root = root
        self._shm = shm
        self.script = os.path.join(root, "cell.py")
        self.socket = os.path.join(root, "socket")
        self.agent_log = os.path.join(root, "agent.log")
        self.gateway_log = os.path.join(root, "gateway.log")
        self.torchrun_logs = os.path.join(root, "torchrun")
        self.temp = os.path.join(root, "tmp")

    @classmethod
    def from_environment(cls, root: str) -> RunDir:
        """Return the run directory as a rank or an agent sees it."""
        return cls(root, shm=_shm_twin(root))

    @classmethod
    def adopt(cls, root: str) -> RunDir:
        """Return the run directory that a process was told to work in, if nobody else can have put anything there.

        Raises:
            PermissionError: It is not this user's alone.
        """
        if not is_private(root):
            raise PermissionError(f"refusing the run directory {root}: {_whose(root)}")
        return cls.from_environment(root)

    @classmethod
    def create(cls, root: str) -> RunDir:
        """Make the directory and what must stand in it before the launch.

        Raises:
            LaunchError: It cannot be made; the message says why and what to do.
        """
        run = cls.from_environment(root)
        try:
            os.mkdir(root, 0o700)
            for path in (run.torchrun_logs, run.temp):
                os.mkdir(path, 0o700)
        except OSError as error:
            run.remove()
            raise cannot_write("make a run directory", root, error) from error
        return run

    def stacks(self, rank: int) -> str:
        """Return the file into which a rank's faulthandler writes."""
        return os.path.join(self.root, f"stacks.{rank}")

    def meeting_place(self, attempt: int) -> str:
        """Return the file through which the ranks find each other; after a restart, another one."""
        return os.path.join(self.root, f"store.{attempt}")

    def workers_temp(self, rank: int) -> str:
        """Return the directory that multiprocessing in this rank uses for its sockets."""
        return os.path.join(self.root, f"mp.{rank}")

    def store(self, name: str, size: int, write: Callable[[str], None]) -> str:
        """Have `write` write a new file of `size` bytes: in memory if there is room, else on disk.

        Args:
            name: The file's name; one of that name is deleted before.
            size: Its size in bytes.
            write: Called with the path.

        Returns:
            The path.

        Raises:
            LaunchError: Neither has room; the message names both and their sizes.
            OSError: It could not be written.
        """
        path = self.place(name, size)
        try:
            write(path)
        except OSError as error:  # another rank has taken the room meanwhile
            if error.errno != errno.ENOSPC or os.path.dirname(path) == self.root:
                raise
            path = self.place(name, size, memory=False)
            write(path)
        return path

    def place(self, name: str, size: int, *, memory: bool = True) -> str:
        """Return where a new file of `size` bytes is to be written; one of that name is deleted.

        Args:
            name: The file's name.
            size: Its size in bytes.
            memory: Whether it may lie in memory, where there is room.

        Raises:
            LaunchError: There is no room; the message says where, and how much there is.
        """
        free = {}
        if self._shm is not None and os.path.isdir(_SHM):
            free[_SHM] = _free(_SHM)
            if size > _LITTLE:
                # It may be larger than the memory that this process may have, and that would kill the kernel.
                free[_SHM] = min(free[_SHM], _process.available_memory())
            if memory and free[_SHM] >= size + _SHM_RESERVE and self._make_shm():
                return _cleared(os.path.join(self._shm, name))
        parent = os.path.dirname(os.path.dirname(self.root))
        free[parent] = _free(parent)
        if free[parent] < size:
            room = " and ".join(f"{format_size(n)} in {place}" for place, n in free.items())
            raise LaunchError(
                f"no room for {format_size(size)} of data: there are {room} free. "
                "Make room, or set TMPDIR to a folder that has it and restart the kernel"
            )
        return _cleared(os.path.join(self.root, name))

    def _make_shm(self) -> bool:
        assert self._shm is not None
        # Names in /dev/shm can be foreseen by who watches /tmp: it may be another's.
        if not is_private(os.path.dirname(self._shm)):
            return False
        with contextlib.suppress(OSError):
            os.mkdir(self._shm, 0o700)
        return is_private(self._shm)

    def renew(self) -> None:
        """Delete what ranks and agent have left, before others begin with the same script."""
        for name in os.listdir(self.root):
            if name == "socket" or name.startswith(("store.", "stacks.")):
                os.unlink(os.path.join(self.root, name))

    def clear_cell(self) -> None:
        """Delete what a cell was sent and has written, of ranks that stay."""
        for folder in filter(None, (self.root, self._shm)):
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(folder):
                    if name.startswith(("closure.", "results.", "exception.")):
                        os.unlink(os.path.join(folder, name))

    def remove(self) -> None:
        """Delete everything; safe to call twice, and from the kernel and the launcher at once."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self._shm is not None:
            shutil.rmtree(self._shm, ignore_errors=True)

    def remove_again(self) -> None:
        """If it was removed, delete what processes that were still ending have made there since."""
        if not os.path.exists(self.script):
            self.remove()


def is_private(path: str) -> bool:
    """Tell whether there is a directory at `path`, no link, of this user's, that nobody else can look or write into."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _whose(path: str) -> str:
    try:
        status = os.lstat(path)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    return (
        f"it belongs to uid {status.st_uid}, with mode {stat.S_IMODE(status.st_mode):o}; it must be this user's alone"
    )


def _cleared(path: str) -> str:
    with contextlib.suppress(FileNotFoundError):  # of an attempt before a restart
        os.unlink(path)
    return path


class Session:
    """The directory of one kernel's session: its launcher's log, its runs, the logs of the last one.

    It has a twin of the same name in memory-backed storage, where there is such, for data that the ranks map.
    """

    def __init__(self) -> None:
        """Make the directory.

        Raises:
            LaunchError: No temporary directory can be written.
        """
        self.pid = os.getpid()
        try:
            self.root = tempfile.mkdtemp(prefix=f"{_PREFIX}{self.pid}-")
            self._locks = [_lock(self.root)]
        except OSError as error:
            if root := getattr(self, "root", None):
                _remove_half_made(root)
            raise cannot_write("make a session directory", _temp_dir(), error) from error
        self.name = os.path.basename(self.root)
        with contextlib.suppress(OSError):  # there is none; or somebody was faster, and it stays unused
            os.mkdir(os.path.join(_SHM, self.name), 0o700)
            self._locks.append(_lock(os.path.join(_SHM, self.name)))
        self.launcher_log = os.path.join(self.root, "launcher.log")
        self._numbers = itertools.count(1)
        self._logs: Logs | None = None
        self._ruins: list[str] = []
        # A run in the background may end at any moment.
        self._deleting = threading.Lock()

    def new_run(self) -> RunDir:
        """Return a fresh run directory. Raises LaunchError if it cannot be made."""
        self._delete()
        return RunDir.create(os.path.join(self.root, f"run-{next(self._numbers)}"))

    def check(self) -> None:
        """See that the directory is still this user's alone; LaunchError if not."""
        if not is_private(self.root):
            raise LaunchError(
                f"refusing the session directory {self.root}: {_whose(self.root)}. Somebody has changed it since "
                "it was made. Restart the kernel, with TMPDIR set to a folder in which others cannot rename your files"
            )

    def end_run(self, run: RunDir) -> None:
        """Delete a run's directory."""
        self._delete(run.root, _shm_twin(run.root))

    def _delete(self, *paths: str) -> None:
        """Delete folders; what cannot be deleted now, for want of descriptors, goes before the next run."""
        with self._deleting:
            ruins, self._ruins = [*self._ruins, *paths], []
            for path in ruins:
                shutil.rmtree(path, ignore_errors=True)
            self._ruins += filter(os.path.exists, ruins)

    @property
    def locks(self) -> tuple[int, ...]:
        """The descriptors of the locks. Who inherits one keeps the session from being taken for dead."""
        return tuple(self._locks)

    @property
    def logs(self) -> str | None:
        """The directory with the ranks' logs of the last run, if there was one.

        Raises:
            LaunchError: They cannot be written.
        """
        try:
            return self._logs.saved() if self._logs is not None else None
        except OSError as error:
            raise cannot_write("write the logs", self.root, error) from error

    def keep_logs(self, logs: Logs) -> None:
        """Keep the logs of a run that has ended; those of the one before are deleted."""
        old, self._logs = self._logs, logs
        if old is not None:
            old.delete()

    def close(self) -> None:
        """Delete the directory and give up the lock."""
        remove_session(self.root)
        while self._locks:
            os.close(self._locks.pop())


def _remove_half_made(root: str) -> None:
    """Delete the directory of a session that was never locked; without opening it, for which there may be no way."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(root, f"{_LOCK}.new"))
    with contextlib.suppress(OSError):
        os.rmdir(root)


def _lock(directory: str) -> int:
    """Mark the directory as in use for as long as this process lives."""
    path = os.path.join(directory, _LOCK)
    # Under its name only once it is locked: another kernel's sweep takes one that is not for a dead kernel's.
    fd = os.open(f"{path}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.rename(f"{path}.new", path)
    return fd


def remove_session(root: str) -> None:
    """Delete a session's directory and its twin in memory."""
    folders = [root, os.path.join(_SHM, os.path.basename(root))]
    for _ in range(_REMOVE_TIMES):
        for folder in folders:
            _remove(folder)
        folders = list(filter(os.path.exists, folders))
        if not folders:
            return
        # A process that is just ending has put something there meanwhile.
        time.sleep(_REMOVE_SECONDS)


def _remove(folder: str) -> None:
    """Delete a session's folder, its lock last: whoever is killed in between leaves what the next sweep takes."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != _LOCK:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
    shutil.rmtree(folder, ignore_errors=True)


def sweep() -> list[str]:
    """Delete what sessions of this user left behind whose processes are all gone.

    Returns:
        Their names, so that processes marked with them can be looked for.
    """
    dead = set()
    for base in (_temp_dir(), _SHM):
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(base)):
                if _is_session(entry) and _abandoned(entry.path):
                    _remove(entry.path)
                    dead.add(entry.name)
    return sorted(dead)


def _is_session(entry: os.DirEntry[str]) -> bool:
    parts = entry.name.split("-", 2)
    return entry.name.startswith(_PREFIX) and len(parts) == 3 and parts[1].isdigit() and is_private(entry.path)


def _abandoned(root: str) -> bool:
    """Tell whether nobody holds the lock of the session's directory at `root`."""
    try:
        fd = os.open(os.path.join(root, _LOCK), os.O_RDWR)
    except FileNotFoundError:
        # It is being made this moment, or was half removed long ago.
        with contextlib.suppress(OSError):
            return os.stat(root).st_mtime < time.time() - _HALF_MADE
        return False
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _shm_twin(run_root: str) -> str:
    """Return the directory in memory that belongs to the run directory at `run_root`."""
    session, run = os.path.split(run_root)
    return os.path.join(_SHM, os.path.basename(session), run)


def _temp_dir() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # none can be written; tempfile names them in its message
        return os.environ.get("TMPDIR", "/tmp")


def _free(path: str) -> int:
    try:
        info = os.statvfs(path)
    except OSError:
        return 0
    return info.f_bavail * info.f_frsize


def cannot_write(what: str, path: str, error: OSError) -> LaunchError:
    """Return the error for a file of nbddp's own that could not be written, with the next step."""
    if _limits.is_about_files(error):
        return LaunchError(_limits.no_more_files(f"cannot {what}"))
    reason = (error.strerror or str(error)).lower()
    step = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
    place = _temp_dir() if path.startswith(_temp_dir()) else os.path.dirname(path)
    return LaunchError(f"cannot {what} in {place}: {reason}. Either {step}, or set TMPDIR to another folder")


def format_size(size: int) -> str:
    """Return a number of bytes as a person writes it, such as ``1.5 MB``."""
    number = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
