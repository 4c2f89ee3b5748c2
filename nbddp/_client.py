"""The kernel's end of the launcher: starts it, asks it, replaces it, ends it."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nbddp import _allocation, _limits, _process, _settings, _wire
from nbddp._errors import LaunchError
from nbddp._launcher import GOODBYE, THE_END
from nbddp._paths import Session, remove_session, sweep
from nbddp._stop import InterruptGate

# A launcher that was told to go needs a few milliseconds; one that is importing has nothing to see to, and is killed.
_GOODBYE_SECONDS = 1.0

_COMMAND = (
    "import sys; sys.path[:] = {path!r}; from nbddp._launcher import main; "
    "main({kernel}, {session!r}, {control}, {locks})"
)


class Client:
    """One per kernel: its session directory and its launcher. Safe to use from any thread.

    Attributes:
        cannot_fork: Where a forked rank has found that it cannot use CUDA: runs start new interpreters there. None is
            this machine, and others are what `nbddp._placement.Placement.machines` has.
    """

    def __init__(self) -> None:
        self.cannot_fork: set[tuple[object, ...] | None] = set()
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._started_with: dict[str, str] = {}

    def start(self, env: Mapping[str, str] | None = None) -> list[str]:
        """Start the launcher in the background, unless one is there that suits `env`.

        Args:
            env: The environment that ranks will have; this process's own by default.

        Returns:
            The variables for whose sake a launcher that was there is replaced.

        Raises:
            LaunchError: It cannot be started.
        """
        env = dict(os.environ if env is None else env)
        with self._lock:
            session = self.session
            wanted = _settings.read_at_load(env)
            changed = []
            if self._process is not None and self._process.poll() is None:
                if wanted == self._started_with:
                    return []
                changed = sorted({name for name, _ in wanted.items() ^ self._started_with.items()})
                if others := _allocation.holders():
                    raise LaunchError(
                        f"{', '.join(changed)} changed, which torch reads when it loads; loading it anew would end "
                        f"{' and '.join(others)}. End that first, or set the variable back"
                    )
            self._stop_launcher()
            ours, theirs = _socketpair()
            command = _COMMAND.format(
                path=_path_for_launcher(),
                kernel=os.getpid(),
                session=session.root,
                control=theirs.fileno(),
                locks=session.locks,
            )
            env |= dict.fromkeys(_settings.THREAD_LIMITS, "1")
            env |= {_settings.SESSION: session.name, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
            try:
                with theirs, open(session.launcher_log, "wb") as log:
                    self._process = subprocess.Popen(
                        [sys.executable, "-P", "-c", command],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=env,
                        cwd=session.root,
                        pass_fds=[theirs.fileno(), *session.locks],
                        # Jupyter's interrupt signals the kernel's whole group; ranks are told once, by nbddp.
                        start_new_session=True,
                    )
            except OSError as error:
                ours.close()
                raise _cannot_start(error) from error
            self._control = ours
            self._started_with = wanted
            return changed

    @property
    def session(self) -> Session:
        """This kernel's session; made at first use.

        Raises:
            LaunchError: Its directory cannot be made.
        """
        with self._lock:
            self._disown_parents()
            if self._session is not None and not os.path.isdir(self._session.root):
                # A cleaner of the temporary directory took it from a notebook that was idle for days.
                self._stop_launcher()
                self._session.close()
                self._session = None
            if self._session is None:
                # What a killed kernel left is this user's, and nobody else will clear it away.
                for name in sweep():
                    _process.kill_marked(_settings.SESSION, name)
                self._session = Session()
                atexit.register(self.close)
            self._session.check()
            return self._session

    def open_channel(self, env: Mapping[str, str]) -> _wire.Inbox:
        """Return a channel for one request to a launcher that suits `env`.

        Raises:
            LaunchError: There is no launcher to be had.
        """
        with self._lock:
            for attempt in (1, 2):
                self.start(env)
                assert self._control is not None
                self.wake()
                assert self._process is not None
                _limits.share(self._process.pid)
                ours, theirs = _socketpair()
                with theirs:
                    try:
                        socket.send_fds(self._control, [b"c"], [theirs.fileno()])
                        return _wire.Inbox(ours)
                    except OSError as error:
                        # It died, and the process table does not know yet: another one.
                        ours.close()
                        self._stop_launcher()
                        if attempt == 2:
                            raise self.launcher_died() from error
        raise AssertionError("unreachable")

    def start_method(self, env: Mapping[str, str], machines: int = 1, where: tuple[object, ...] | None = None) -> str:
        """Return how ranks are started: "fork" or "spawn".

        Args:
            env: Their environment.
            machines: On how many machines they are launched by hand, one for each.
            where: On which nodes they are; None for this machine.

        Raises:
            LaunchError: The user asks for another way.
        """
        try:
            wanted = _settings.start_method(env)
        except ValueError as error:
            raise LaunchError(str(error)) from None
        # macOS frameworks abort in forked children.
        # Nor may an agent fork that serves torch's store, as the first of several machines' does: that has threads.
        can_fork = sys.platform == "linux" and where not in self.cannot_fork and machines == 1
        return wanted or ("fork" if can_fork else "spawn")

    def count_gpus(self, env: Mapping[str, str], gate: InterruptGate, seconds: float | None = None) -> int:
        """Ask the launcher how many GPUs there are: neither it nor the kernel may look for itself.

        Args:
            env: The environment that ranks will have.
            gate: Tells of interrupts.
            seconds: How long to wait for the answer, which comes once torch is imported; None for as long as it takes.

        Raises:
            LaunchError: There is no launcher to be had, or it cannot count.
            TimeoutError: It has not answered in time.
        """
        question = {"env": dict(env)}
        return int(self._ask("count gpus", "the GPUs could not be counted", env, gate, seconds, question)["count"])

    def backends(self, env: Mapping[str, str], gate: InterruptGate) -> list[str]:
        """Ask the launcher which backends torch has for process groups.

        Raises:
            LaunchError: There is no launcher to be had.
        """
        return list(self._ask("backends", "torch's backends could not be looked up", env, gate)["names"])

    def _ask(
        self,
        kind: str,
        fault: str,
        env: Mapping[str, str],
        gate: InterruptGate,
        seconds: float | None = None,
        fields: Mapping[str, Any] = MappingProxyType({}),
    ) -> _wire.Message:
        """Return the launcher's answer to a question with these fields; `fault` is what is said if it refuses."""
        channel = self.open_channel(env)
        answer = select.poll()
        answer.register(channel.sock, select.POLLIN)
        try:
            with gate.open():
                _wire.send(channel.sock, kind, **fields)
                while not channel.closed:
                    if not answer.poll(None if seconds is None else seconds * 1000):
                        break
                    for message in channel.receive():
                        if message["kind"] == "refused":
                            raise LaunchError(f"{fault}: {message['reason']}")
                        return message
                else:
                    raise self.launcher_died()
        except OSError:
            raise self.launcher_died() from None
        finally:
            channel.close()
        raise TimeoutError

    def wake(self) -> None:
        """Let the launcher go on, if somebody has stopped it: a run would wait for it, and so would its end."""
        with self._lock:
            if self._process is not None:
                self._process.send_signal(signal.SIGCONT)

    def launcher_died(self) -> LaunchError:
        """Return the error for a launcher that ended by itself."""
        return LaunchError("nbddp's launcher ended before it could start the run", notes=(self.last_words(),))

    def last_words(self) -> str:
        """Return the end of the launcher's log."""
        with contextlib.suppress(OSError), open(self.session.launcher_log, errors="replace") as log:
            return log.read()[-2000:].strip()
        return ""

    def _disown_parents(self) -> None:
        """Forget, in a forked child of the kernel, what is the kernel's."""
        if self._session is not None and self._session.pid != os.getpid():
            self._session = self._process = self._control = None

    def give_up_launcher(self) -> None:
        """Go on without the launcher, which has ended or is about to, and kill what still runs of its runs."""
        with self._lock:
            if self._process is not None:
                # It may live: for want of descriptors, say, it has lost the channel of a run and nothing else.
                self._process.kill()
                self._process.wait()
            self._stop_launcher()

    def _end_leftovers(self) -> None:
        """Kill what still runs of this session after its launcher was killed."""
        # Not the session that would be made anew if this one's directory is gone already.
        if self._session is not None:
            _process.kill_marked(_settings.SESSION, self._session.name)

    def _stop_launcher(self, *, word: bytes = GOODBYE) -> None:
        self.wake()
        process, self._process = self._process, None
        control, self._control = self._control, None
        if control is not None:
            # With GOODBYE it leaves the session's directory alone, which outlives it.
            with contextlib.suppress(OSError):
                control.send(word)
            control.close()
        if process is not None:
            died = process.poll() is not None
            if not died:
                try:
                    process.wait(_GOODBYE_SECONDS)
                except subprocess.TimeoutExpired:
                    if word == THE_END and self._session is not None:
                        # Before it is gone, not after: were this process killed in between, nobody would do it.
                        remove_session(self._session.root)
                    process.kill()
                    process.wait()
                    died = True
            if died:
                self._end_leftovers()

    def close(self) -> None:
        """End the launcher, and with it every run, and delete the session's directory. Safe to call twice."""
        with self._lock:
            # A forked child of the kernel runs this at its exit, too.
            self._disown_parents()
            if self._session is not None:
                # It deletes the directory as well: a server that loses patience kills a kernel that waits here.
                self._stop_launcher(word=THE_END)
                self._session.close()
                self._session = None
            atexit.unregister(self.close)


def _socketpair() -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair()
    except OSError as error:
        raise _cannot_start(error) from error


def _cannot_start(error: OSError) -> LaunchError:
    what = "cannot start the launcher"
    return LaunchError(_limits.explanation(what, str(error), starting=True) or f"{what}: {error}")


def _path_for_launcher() -> list[str]:
    """Return the kernel's search path with the notebook's folder last."""
    # The launcher imports half of the standard library anew; a queue.py or types.py beside the notebook must not stand
    # in for Python's own. The kernel itself looks there first, but only once it is up.
    return sorted(search_path(), key=lambda folder: folder == working_directory())


def search_path() -> list[str]:
    """Return ``sys.path`` as absolute folders; its empty entry is the working directory."""
    here = working_directory()
    return [os.path.normpath(os.path.join(here, os.fspath(p))) for p in sys.path if isinstance(p, str | os.PathLike)]


def own_folders() -> Sequence[str]:
    """Return the folders of ``sys.path`` that an interpreter started elsewhere would not have."""
    prefixes = tuple(os.path.join(p, "") for p in {sys.prefix, sys.base_prefix, sys.exec_prefix})
    return [p for p in search_path() if not os.path.join(p, "").startswith(prefixes)]


def working_directory() -> str:
    """Return the working directory, or an empty string if it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return ""
