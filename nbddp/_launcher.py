"""The launcher: the process that has torch imported and forks an agent for each run.

One per kernel, started in the background when the extension is loaded. It runs no user code and no torch operation,
touches no device and has one thread, so that what is forked from it is as good as new. What it owns is the end of
runs: it adopts whatever a run leaves behind and kills it.

The kernel holds the other end of the control socket. Each byte on it brings a channel, a socket for one request and
its answers:

====================  ===========================================================================================
count gpus            answered by ``gpus``; the channel closes
backends              answered by ``backends``, those of torch's process groups; the channel closes
launch                ``started`` with the agent's pid; and when the run and all it left are gone, ``ended``
serve store           comes with a listening socket: ``started``; torch's store is behind it until the channel closes
finish                the run's ranks have reported; what is not gone by itself in ``seconds`` is killed
kill                  everything of the run is killed now
(channel closed)      the same, unless it is to finish: a run lives no longer than the interest in it
====================  ===========================================================================================

If the kernel dies, so do the runs, the launcher and the session's directory.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from nbddp import _agent, _backends, _limits, _process, _rendezvous, _repair, _wire
from nbddp._paths import RunDir, remove_session

# What the kernel sends instead of a channel: when it goes on without this launcher, and when its session is over. Only
# a word is sure to be heard: a forked child of the kernel may hold its end of the socket open.
GOODBYE = b"q"
THE_END = b"e"

# Seconds that a run whose ranks have all reported has to end by itself. Longest is NCCL's clean-up.
_FINISH_SECONDS = 10.0

# Seconds between two looks for the kernel while this process imports.
_LOOK_SECONDS = 0.1

# What the first optimizer or DDP module in a process imports, and IPython's tracebacks: over a second in all, for each
# rank. In pieces, so that a cell that comes in between waits for one of them only.
_FOR_TRAINING = (
    "mpmath",
    "sympy",
    "stack_data",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.distributed.fsdp",
    "torch._dynamo",
)


_AGENT_COMMAND = "import sys; sys.path[:] = {path!r}; from nbddp._agent import main; sys.exit(main())"


@dataclass
class _Run:
    """A run and the channel on which it was asked for; or a store, which has no directory."""

    pid: int
    directory: str
    inbox: _wire.Inbox
    deadline: float = float("inf")


class Launcher:
    """The event loop. Everything happens in its one thread."""

    def __init__(self, control: socket.socket, kernel: int, session: str, locks: tuple[int, ...]) -> None:
        self._locks = locks
        self._control = control
        self._kernel = kernel
        self._session = session
        self._selector = selectors.DefaultSelector()
        self._runs: dict[int, _Run] = {}
        self._channels = 0
        self._gpus: dict[tuple[str | None, ...], int] = {}
        self._open = True
        self._session_goes_on = False

    def serve(self) -> None:
        """Answer requests until the kernel closes its end or dies."""
        wake, self._waker = socket.socketpair()
        for end in (wake, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(wake, selectors.EVENT_READ, partial(self._drain, wake))
        self._selector.register(self._control, selectors.EVENT_READ, self._accept)
        # A forked child of the kernel may hold its end of the socket open; its death is seen this way too.
        kernel = _process.open_pidfd(self._kernel)
        if kernel is not None:
            self._selector.register(kernel, selectors.EVENT_READ, self._stop)
        try:
            with self._ending_with_kernel():
                import_for_ranks(os.path.join(self._session, "tmp"))
            to_import = list(_FOR_TRAINING)
            while self._open:
                self._step(0.0 if to_import and self._is_idle() else self._timeout())
                if to_import and self._is_idle():
                    with self._ending_with_kernel():
                        import_if_there(to_import.pop(0))
                    if not to_import:
                        make_ready_to_fork()
        finally:
            self._kill_everything()
            # After an exception the log in there is what the kernel has to show.
            if not (self._open or self._session_goes_on):
                remove_session(self._session)

    @contextlib.contextmanager
    def _ending_with_kernel(self) -> Iterator[None]:
        """Look for the kernel's death while this process imports, which takes seconds, and is not in its loop.

        (A signal at the parent's death is none for this: it is sent when the thread ends that has started the process.)
        """

        def look(*_: Any) -> None:
            if os.getppid() != self._kernel:
                self._kill_everything()
                remove_session(self._session)
                os._exit(0)

        before = signal.signal(signal.SIGALRM, look)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _is_idle(self) -> bool:
        """Tell whether nobody waits for anything: runs that are only being cleaned up do not count."""
        return self._channels == sum(run.deadline < float("inf") for run in self._runs.values())

    def _step(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            key.data()
        if os.getppid() != self._kernel:
            self._stop()
        now = time.monotonic()
        for run in [run for run in self._runs.values() if run.deadline <= now]:
            self._kill(run)

    def _timeout(self) -> float | None:
        deadline = min((run.deadline for run in self._runs.values()), default=float("inf"))
        if deadline == float("inf"):
            # Where no descriptor tells of the kernel's death its pid must be asked for.
            return None if hasattr(os, "pidfd_open") else 1.0
        return max(0.0, deadline - time.monotonic())

    def _stop(self) -> None:
        self._open = False

    # Requests.

    def _accept(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        except OSError:
            data, fds = b"", []
        if data == GOODBYE:
            self._session_goes_on = True
        if data in (b"", GOODBYE, THE_END):
            self._stop()
        for fd in fds:
            os.set_inheritable(fd, False)
            inbox = _wire.Inbox(socket.socket(fileno=fd))
            self._channels += 1
            self._selector.register(inbox.sock, selectors.EVENT_READ, partial(self._request, inbox))

    def _forget(self, inbox: _wire.Inbox) -> None:
        if inbox.sock.fileno() in self._selector.get_map():
            self._selector.unregister(inbox.sock)
        self._channels -= 1
        inbox.close()

    def _request(self, inbox: _wire.Inbox) -> None:
        messages = inbox.receive()
        if inbox.closed or any(message["kind"] == "kill" for message in messages):
            # It was taken back, most often by an interrupt while this process was still importing.
            self._answer(inbox, "ended", status=0)
            self._forget(inbox)
            return
        for message in messages:
            match message.pop("kind"):
                case "count gpus":
                    try:
                        self._answer(inbox, "gpus", count=self._count_gpus(message["env"]))
                    except OSError as error:
                        self._answer(inbox, "refused", reason=_refusal(error))
                    self._forget(inbox)
                case "backends":
                    self._answer(inbox, "backends", names=_backends.available())
                    self._forget(inbox)
                case "launch":
                    self._launch(inbox, _agent.Launch(**message))
                case "serve store":
                    self._serve_store(inbox, inbox.fds.pop(0))

    def _answer(self, inbox: _wire.Inbox, kind: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):
            _wire.send(inbox.sock, kind, **fields)

    def _count_gpus(self, env: dict[str, str]) -> int:
        """Count the GPUs that a process with this environment sees; in a child, since counting may touch them."""
        import torch

        if not torch.backends.cuda.is_built():
            return 0
        names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
        key = tuple(env.get(name) for name in names)
        if key not in self._gpus:
            ours, theirs = os.pipe()
            try:
                pid = os.fork()
            except OSError:
                os.close(ours)
                os.close(theirs)
                raise
            if pid == 0:
                count = 0
                with contextlib.suppress(BaseException):
                    os.environ.clear()
                    os.environ.update(env)
                    count = torch.cuda.device_count()
                os.write(theirs, str(count).encode())
                os._exit(0)
            os.close(theirs)
            with open(ours, "rb") as answer:
                self._gpus[key] = int(answer.read() or b"0")
        return self._gpus[key]

    def _launch(self, inbox: _wire.Inbox, launch: _agent.Launch) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        launcher = os.getpid()
        try:
            pid = os.fork() if launch.start_method == "fork" else _spawn(launch)
        except OSError as error:
            self._answer(inbox, "refused", reason=_refusal(error))
            self._forget(inbox)
            return
        if pid == 0:
            self._forget_all()
            _agent.run_forked(launch, launcher)
        self._follow(_Run(pid, launch.run_dir, inbox))

    def _serve_store(self, inbox: _wire.Inbox, holder: int) -> None:
        """Serve the store of several machines' agents: in a process of its own, since the store has threads."""
        launcher = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(holder)
            self._answer(inbox, "refused", reason=_refusal(error))
            self._forget(inbox)
            return
        if pid == 0:
            self._forget_all()
            _rendezvous.serve_until_killed(holder, launcher)
        os.close(holder)
        self._follow(_Run(pid, "", inbox))

    def _follow(self, run: _Run) -> None:
        """See to the end of a run that has just been started."""
        self._runs[run.pid] = run
        self._answer(run.inbox, "started", pid=run.pid)
        self._selector.modify(run.inbox.sock, selectors.EVENT_READ, partial(self._command, run))

    def _forget_all(self) -> None:
        """Close, in a forked agent, what is the launcher's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, int):
                os.close(key.fileobj)
            else:
                key.fileobj.close()  # type: ignore[attr-defined]  # they are sockets
        self._waker.close()
        self._selector.close()
        for fd in self._locks:
            os.close(fd)

    def _command(self, run: _Run) -> None:
        for message in run.inbox.receive():
            match message["kind"]:
                case "finish":
                    run.deadline = time.monotonic() + (message["seconds"] or _FINISH_SECONDS)
                case "kill":
                    self._kill(run)
        if run.inbox.closed and run.pid in self._runs:
            self._selector.unregister(run.inbox.sock)
            if run.deadline == float("inf"):
                self._kill(run)

    # The ends of runs.

    def _drain(self, wake: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while wake.recv(4096):
                pass
        self._reap()

    def _reap(self) -> None:
        """Take note of children that ended; when one was an agent, end what its run has left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            run = self._runs.pop(pid, None)
            if run is not None:
                self._end_leftovers()
                if run.directory:
                    RunDir.from_environment(run.directory).remove_again()
                self._answer(run.inbox, "ended", status=os.waitstatus_to_exitcode(status))
                self._forget(run.inbox)

    def _end_leftovers(self) -> None:
        """Kill what runs have left: an agent adopts its own orphans, so what comes here is of a run that is over."""
        while leftovers := [pid for pid in _process.children() if pid not in self._runs]:
            _process.kill_all(leftovers)
            for pid in leftovers:
                # Each one's own children become this process's when it is gone, and are found in the next round.
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def _kill(self, run: _Run) -> None:
        # Once the agent is gone its ranks are this process's children and are killed when it is reaped.
        run.deadline = float("inf")
        _process.send_signal(run.pid, None, signal.SIGKILL)

    def _kill_everything(self) -> None:
        for run in list(self._runs.values()):
            self._kill(run)
        self._runs.clear()
        self._end_leftovers()


def _refusal(error: OSError) -> str:
    what = "cannot start a process"
    return _limits.explanation(what, str(error), starting=True) or f"{what}: {error.strerror}"


def _spawn(launch: _agent.Launch) -> int:
    """Start an agent as a new interpreter; return its pid."""
    run = RunDir.from_environment(launch.run_dir)
    with open(run.agent_log, "ab") as log:
        process = subprocess.Popen(
            # As the kernel starts this process: no queue.py beside the notebook may stand in for Python's own.
            [sys.executable, "-P", "-c", _AGENT_COMMAND.format(path=sys.path), *launch.torchrun_arguments()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(launch.env),
            cwd=launch.cwd,
            umask=launch.umask,
            start_new_session=True,
        )
    # It is reaped with all other children; Popen must not warn that it was not.
    process.returncode = 0
    return process.pid


def import_for_ranks(temp: str) -> None:
    """Import what every rank needs, and make its shell."""
    import pdb  # noqa: F401

    import torch
    import torch.distributed.run
    import torch.nn.parallel  # noqa: F401

    from nbddp import _closure, _group, _rank, _shell  # noqa: F401

    _repair.prepare()
    _agent.rehearse()
    _shell.make(temp)
    make_ready_to_fork()


def import_if_there(module: str) -> None:
    """Import a module; which ones there are, and work, differs from machine to machine."""
    with contextlib.suppress(Exception):
        importlib.import_module(module)


def make_ready_to_fork() -> None:
    """Spare the ranks what need not be theirs.

    The garbage collector is to leave alone what is here: touching it would copy its pages in every rank. And what is
    here is not for a rank to finalise at its end: the 174 operator libraries of torch alone take 30 ms.
    """
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        finalizer.atexit = False
    gc.collect()
    gc.freeze()


def main(kernel: int, session: str, control: int, locks: tuple[int, ...]) -> None:
    """Be the launcher of a kernel.

    Args:
        kernel: The kernel's pid.
        session: The session's directory.
        control: The descriptor of this end of the control socket.
        locks: The descriptors of the session's locks: while this process cleans up after its kernel, no other kernel is
            to take the session for a dead one's.
    """
    # Nothing sends it one, but what is forked from here would otherwise have a handler of Python's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for fd in (control, *locks):
        os.set_inheritable(fd, False)
    _process.become_subreaper()
    Launcher(socket.socket(fileno=control), kernel, session, locks).serve()
