"""torchrun's rendezvous, as ``--rdzv-backend nbddp``: for one machine, and for nodes whose store nbddp serves.

torchrun loads this module, on every start and for everybody, through the entry-point group ``torchrun.handlers``, so
its own imports are light and torch's are made when a handler is asked for.

The ways that torchrun ships have two faults for a notebook. A port that was chosen, closed and handed on as a number
may be somebody else's when it is opened again. And ``--standalone`` listens on every interface with a store in which
the agents' state is pickled: who can reach the port can run code. This one holds a port of the loopback interface
itself. In a run of nbddp no store is behind it at first: its process group meets in a file of the run directory, which
no other user can open. One is served as soon as somebody connects: a cell that asks for ``env://``, or its programs.

On several nodes the store is served from the beginning, by a process of the first node's launcher, at the one address
by which the others reach it; agents and ranks are its clients. Which node is which is told, not negotiated.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

BACKEND = "nbddp"
LOOPBACK = "127.0.0.1"

_TIMEOUT = timedelta(seconds=900)  # torchrun's own default

# The signal that has asked this agent to end.
_asked_by: signal.Signals | None = None


def note(signum: int, frame: FrameType | None) -> None:
    """Handle a signal that asks the agent to end, in torchrun's stead.

    Its own handler raises wherever the agent is. Inside `logging`, or in what Python itself calls, such as a finalizer,
    the exception is printed at most, and the agent goes on. This one raises nothing: the agent ends when it next asks
    its rendezvous whether there are new nodes, which it does whenever it looks at its ranks, the first time when all of
    them are started.
    """
    global _asked_by
    _asked_by = signal.Signals(signum)


def get_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return what makes a handler, as the entry-point group asks for it."""
    return _create_handler


def hold_port() -> socket.socket:
    """Return a socket that listens on a free port of the loopback interface; who connects waits until he is served."""
    return socket.create_server((LOOPBACK, 0), backlog=socket.SOMAXCONN)


def serve_until_killed(fd: int, parent: int) -> NoReturn:
    """Serve a store on a listening socket, in a process that was just forked for that. Does not return."""
    from nbddp import _process

    try:
        os.setsid()
        _process.die_with_parent(parent)
        store = serve_store(socket.socket(fileno=fd))
        while store is not None:
            signal.pause()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def serve_store(holder: socket.socket, timeout: timedelta = _TIMEOUT) -> Any:
    """Return a ``torch.distributed.TCPStore`` that serves where `holder` listens, and takes it over."""
    from torch.distributed import TCPStore

    host, port = holder.getsockname()[:2]
    # The store owns the descriptor from here on.
    fd = holder.detach()

    def store(**options: Any) -> Any:
        return TCPStore(
            host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=fd, **options
        )

    try:
        return store()
    except NotImplementedError:
        # torch 2.6 and 2.7 cannot hand a socket to their default server; they refuse before touching it.
        return store(use_libuv=False)


def _create_handler(params: RendezvousParameters) -> RendezvousHandler:
    from torch.distributed import HashStore, PrefixStore, TCPStore
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousStoreInfo,
    )

    from nbddp import _machines, _settings

    in_run = _settings.RUN_DIR in os.environ

    class Rendezvous(RendezvousHandler):
        """What both kinds have in common."""

        def get_backend(self) -> str:
            return BACKEND

        @property
        def use_agent_store(self) -> bool:
            return True

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            pass

        def num_nodes_waiting(self) -> int:
            # torchrun asks this whenever it looks at its ranks.
            if _asked_by is not None:
                # Ranks have half a minute to end. Who asks once more does not want to wait for them.
                signal.signal(_asked_by, signal.SIG_DFL)
                raise SignalException(f"{_asked_by.name} asks the agent to end", sigval=_asked_by)
            return 0

        def get_run_id(self) -> str:
            return params.run_id

        def shutdown(self) -> bool:
            # Called twice by torch 2.6 and 2.7. The store goes with the process that serves it.
            return True

    class LoopbackRendezvous(Rendezvous):
        """One agent on one machine: there is nobody to wait for."""

        def __init__(self) -> None:
            self._store: Any = None
            self._holder: socket.socket | None = None

        def next_rendezvous(self) -> RendezvousInfo:
            # Asked again before a restart: a new port, since the keys of the last attempt would mislead the ranks.
            self._holder = hold_port()
            port = self._holder.getsockname()[1]
            if not in_run:
                self._serve()
            # What the agent has to say to itself.
            return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, port))

        def _serve(self) -> None:
            if self._holder is not None:
                self._store, self._holder = serve_store(self._holder), None

        def num_nodes_waiting(self) -> int:
            if self._holder is not None and select.select([self._holder], [], [], 0)[0]:
                self._serve()
            return super().num_nodes_waiting()

    class NodesRendezvous(Rendezvous):
        """Several agents, each of which knows its number, and where the store is that is served for them."""

        def __init__(self, number: int) -> None:
            self._number = number

        def next_rendezvous(self) -> RendezvousInfo:
            host, port = _machines.parse_endpoint(params.endpoint)
            store = TCPStore(host, port, is_master=False, timeout=_TIMEOUT, wait_for_workers=False)
            agents = PrefixStore("agents", store)
            return RendezvousInfo(agents, self._number, params.max_nodes, RendezvousStoreInfo(host, port))

    if params.max_nodes == 1:
        return LoopbackRendezvous()
    if (number := params.get_as_int("rank")) is None:
        raise ValueError(f"--rdzv-backend {BACKEND} for --nnodes {params.max_nodes} takes --rdzv-conf rank=K")
    return NodesRendezvous(number)
