"""The kernel's end of a gateway: how one is started for a run on nodes, and what it is asked for."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any

from nbddp import _beginning, _engines, _settings, _wire
from nbddp._agent import Launch
from nbddp._errors import LaunchError
from nbddp._frames import versions
from nbddp._options import Options
from nbddp._paths import RunDir, Session
from nbddp._placement import Placement

_COMMAND = "import sys; sys.path[:] = {path!r}; from nbddp._gateway import main; main({fd}, {kernel})"

# Seconds that a gateway whose channel is closed has for its end, before it is left to itself.
_GONE_SECONDS = 1.0


class Gateway:
    """The process between this kernel and the nodes of one run.

    Args:
        session: The kernel's session.
        run_dir: The run's files, of which its log is one.
        path: Its ``sys.path``.

    Raises:
        LaunchError: It cannot be started.
    """

    def __init__(self, session: Session, run_dir: RunDir, path: list[str]) -> None:
        self._log = run_dir.gateway_log
        ours, theirs = socket.socketpair()
        command = _COMMAND.format(path=path, fd=theirs.fileno(), kernel=os.getpid())
        try:
            with theirs, open(self._log, "wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, _settings.SESSION: session.name},
                    pass_fds=[theirs.fileno(), *session.locks],
                    # Jupyter's interrupt signals the kernel's whole group.
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise LaunchError(f"cannot start the gateway to the nodes: {error.strerror}") from error
        self.channel = _wire.Inbox(ours)

    def wake(self) -> None:
        """Let it go on, if somebody has stopped it."""
        self._process.send_signal(signal.SIGCONT)

    def reap(self) -> None:
        """Take note of its end, which comes when its channel is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GONE_SECONDS)

    def last_words(self) -> str:
        """Return the end of its log."""
        with contextlib.suppress(OSError), open(self._log, errors="replace") as log:
            return log.read()[-2000:].strip()
        return ""


def request(launch: Launch, run_dir: RunDir, closure: str | None) -> dict[str, Any]:
    """Return what a gateway is told besides the launch.

    Args:
        launch: The launch.
        run_dir: The run's files.
        closure: The file with what the cell uses; None if it is in the script.
    """
    files = {os.path.basename(run_dir.script): run_dir.script}
    if closure is not None:
        files[os.path.basename(closure)] = closure
    return {"files": files, "versions": versions(), "mark": launch.env[_settings.MARK]}


def ranks_per_node(options: Options) -> int | None:
    """Return how many ranks options ask for on each node, or on this machine; None if they do not say.

    Raises:
        LaunchError: GPUs of this machine cannot be shared out among nodes that are its processes.
    """
    listed = len(options.gpu_ids)
    if listed and options.engine_name == "local":
        if listed % options.nnodes:
            raise LaunchError(
                f"--gpu-ids {','.join(map(str, options.gpu_ids))}: with --engine local these are shared out among "
                f"--nnodes {options.nnodes} nodes, which takes a multiple of {options.nnodes}"
            )
        return listed // options.nnodes
    return options.cpus or listed or options.gpus


def place(options: Options) -> Placement:
    """Return the nodes that options ask for.

    Raises:
        LaunchError: It does not say how many ranks a node has; or nothing here reaches any.
    """
    ranks = ranks_per_node(options)
    if ranks is None:
        raise LaunchError(
            f"say how many ranks each node has, as in --nnodes {options.nnodes} --gpus 4, or --cpus 2: the notebook's "
            "machine does not know the nodes' GPUs"
        )
    engine = options.engine_name
    if engine is None:
        if shutil.which("srun") is None:
            raise LaunchError(
                f"--nnodes {options.nnodes}: there is no Slurm here (no srun on PATH). --hosts a,b reaches machines "
                "over ssh; --engine local tries the cell on nodes that are processes of this machine; --node-rank and "
                "--rdzv-endpoint are for a launch by hand on each machine"
            )
        engine = "slurm"
    _engines.kind(engine)
    return Placement(
        engine=engine,
        nnodes=options.nnodes,
        ranks_per_node=ranks,
        gpus=options.cpus is None,
        strict=bool(options.gpu_ids),
        hosts=options.hosts,
        slurm=options.slurm or "",
        python=options.python or sys.executable,
        job=f"nbddp-{secrets.token_hex(6)}",
    )


def environment(options: Options, placement: Placement) -> dict[str, str]:
    """Return the variables that go to the nodes: what the notebook has set since it began, and what the user gives.

    The rest is each node's own: a path, a proxy or a cache of this machine need not be right on another.
    """
    env = _beginning.set_since()
    if options.gpu_ids:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, options.gpu_ids))
    env |= options.env
    if placement.visible:
        # Each node begins with its own; see `nbddp._engines.Local`.
        env.pop("CUDA_VISIBLE_DEVICES", None)
    return env
