"""The torchrun agent of one run: torch's own, called by torchrun's own functions.

It is forked from the launcher and forks the ranks, or, where forking is not to be had, it is a new interpreter that
starts them as new interpreters (`main`). Besides what torchrun does it only sees
to its own end and its descendants' (a session of its own, the kernel's word by a socket), and says how ranks died.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nbddp import _process, _rendezvous, _repair, _settings, _wire
from nbddp._paths import RunDir
from nbddp._rendezvous import BACKEND, LOOPBACK

# torch looks for CUDA through NVML with this, instead of initialising the driver, which no fork would survive.
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"

# How often the agent looks at its ranks, in seconds. The notebook learns of their end by its own sockets; this only
# bounds how long they linger after it. 0.02 costs 0.7 % of a core for as long as the cell runs, torchrun's 0.1 nothing.
_MONITOR_INTERVAL = 0.05


@dataclasses.dataclass(frozen=True)
class Launch:
    """What an agent needs to know; crosses the launcher's socket as JSON.

    Attributes:
        run_dir: The run directory.
        ranks: How many ranks.
        max_restarts: How often torchrun may start them again.
        env: Their whole environment.
        cwd: Their working directory; None if the notebook's own is gone.
        umask: Their umask.
        path: Their ``sys.path``; under "spawn" their interpreter's own, and the script adds the notebook's folders.
        start_method: "fork" or "spawn".
        nnodes: How many machines; of each, an agent is started by hand.
        node_rank: Which of them this one is.
        rdzv_endpoint: ``HOST:PORT`` at which the agents meet; None on one machine.
        placed: Whether an engine has placed the agents, and there is a store for them.
        placement: Of a run on nodes, as the gateway gets it: the fields of `nbddp._placement.Placement`.
    """

    run_dir: str
    ranks: int
    max_restarts: int
    env: Mapping[str, str]
    cwd: str | None
    umask: int
    path: Sequence[str]
    start_method: str
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    placed: bool = False
    placement: Mapping[str, Any] | None = None

    def torchrun_arguments(self) -> list[str]:
        """Return what torchrun is called with, the script included."""
        run = RunDir.from_environment(self.run_dir)
        return [
            *torchrun_options(
                self.ranks,
                self.max_restarts,
                self.start_method,
                self.nnodes,
                self.node_rank,
                self.rdzv_endpoint,
                placed=self.placed,
            ),
            *("--log-dir", run.torchrun_logs),  # its own would stay in /tmp
            run.script,
        ]


def torchrun_options(
    ranks: int,
    max_restarts: int,
    start_method: str,
    nnodes: int = 1,
    node_rank: int | str = 0,
    rdzv_endpoint: str | None = None,
    *,
    placed: bool = False,
) -> list[str]:
    """Return torchrun's options for a run, or for this machine's part of one.

    Where it is for people, the machine's number may be a letter.
    """
    options = ["--nnodes", str(nnodes), "--nproc-per-node", str(ranks)]
    if nnodes == 1:
        options += ["--rdzv-backend", BACKEND, "--rdzv-endpoint", f"{LOOPBACK}:0", "--rdzv-id", BACKEND]
    elif placed:
        options += ["--rdzv-backend", BACKEND, "--rdzv-endpoint", rdzv_endpoint or "", "--rdzv-id", BACKEND]
        options += ["--rdzv-conf", f"rank={node_rank}"]
    else:
        # Not c10d: it unpickles what the agents say of themselves, so who reaches its port can run code; and which
        # machine is which would be its choice.
        assert rdzv_endpoint is not None
        options += ["--rdzv-backend", "static", "--rdzv-endpoint", rdzv_endpoint, "--rdzv-id", BACKEND]
        options += ["--node-rank", str(node_rank)]
    if max_restarts:
        options += ["--max-restarts", str(max_restarts)]
    if start_method == "fork":
        options += ["--run-path", "--start-method", "fork", "--monitor-interval", str(_MONITOR_INTERVAL)]
    return options


def run_forked(launch: Launch, parent: int) -> None:
    """Be the agent of a run, in a process that was just forked from the launcher. Does not return."""
    code = 1
    try:
        os.setsid()
        _process.become_subreaper()
        _process.die_with_parent(parent)
        run = RunDir.adopt(launch.run_dir)
        _redirect(run.agent_log)
        os.umask(launch.umask)
        if launch.cwd is not None:
            os.chdir(launch.cwd)
        _set_environment(launch.env)
        sys.path[:] = launch.path
        _repair.agent_pid = os.getpid()
        _repair.agent_only = {_NVML_CHECK: launch.env.get(_NVML_CHECK)}
        os.environ[_NVML_CHECK] = "1"
        # torch leaves a file in the temporary directory for each rank that raises; the ranks get their own back.
        tempfile.tempdir = run.temp
        os.register_at_fork(before=_flush)
        _repair.hold_signals_at_forks()
        code = _serve(run, launch.torchrun_arguments())
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        _flush()
        # The launcher's own exit handlers and finalisers are not this process's to run.
        os._exit(code)


def _serve(run: RunDir, arguments: list[str]) -> int:
    """Run torchrun and tell the kernel how it ended; return the exit status."""
    notebook = _wire.connect(run.socket)
    _wire.send(notebook, "agent", time=time.monotonic())
    failures: list[tuple[int, int]] = []
    try:
        failures = _torchrun(arguments)
    finally:
        _wire.send(notebook, "agent end", failures=failures)
    return 1 if failures else 0


def _torchrun(arguments: list[str]) -> list[tuple[int, int]]:
    """Run torchrun's main function in its parts; return (local rank, exit status) of the ranks that failed."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _look_no_names_up()
    config, command, command_arguments = torchrun.config_from_args(_parse(arguments))
    if config.rdzv_backend == BACKEND:
        _note_signals()
    if hasattr(config, "numa_options"):
        config.numa_options = None
    try:
        torchrun.elastic_launch(config, command)(*command_arguments)
    except ChildFailedError as error:
        return [(failure.local_rank, failure.exitcode) for failure in error.failures.values()]
    return []


def _look_no_names_up() -> None:
    """Keep torchrun from asking a name server for this host's name, which it wants for its logs only.

    A server that does not answer would cost each cell 20 seconds.
    """
    from torch.distributed.elastic.agent.server import api

    if hasattr(api, "_get_fq_hostname"):
        api._get_fq_hostname = socket.gethostname


def _note_signals() -> None:
    """Have signals end torchrun where it can end; `nbddp._rendezvous.note` says why.

    Not where the rendezvous is torchrun's own, which asks nobody.
    """
    from torch.distributed.elastic.multiprocessing import api

    if hasattr(api, "_terminate_process_handler"):
        api._terminate_process_handler = _rendezvous.note


def _parse(arguments: list[str]) -> Any:
    """Return torchrun's own reading of its arguments."""
    from torch.distributed import run as torchrun
    from torch.distributed.launcher.api import LaunchConfig

    if "numa_options" in {field.name for field in dataclasses.fields(LaunchConfig)}:
        # With no binding asked for, torch 2.9 and later look whether there is CUDA, in this process, and that is the
        # end of forking. Ask for one; it is taken away again before anything comes of it.
        arguments = ["--numa-binding", "node", *arguments]
    return torchrun.parse_args(arguments)


def rehearse() -> None:
    """Do in the launcher, once, what need not be done anew in each agent: lazy imports, compiled expressions."""
    import encodings.idna  # noqa: F401  # for the host's name

    import torch.distributed.elastic.agent.server.local_elastic_agent
    import torch.distributed.elastic.rendezvous.registry  # noqa: F401

    _parse([*torchrun_options(1, 0, "fork"), "script"])


def _set_environment(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    time.tzset()


def _redirect(log: str) -> None:
    """Send what torchrun and torch print to a log; the ranks redirect their own output later."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def main() -> Any:
    """Be the agent of a run, in a new interpreter; the launcher has set all else up."""
    _process.become_subreaper()
    _process.die_with_parent(os.getppid())
    return _serve(RunDir.adopt(os.environ[_settings.RUN_DIR]), sys.argv[1:])
