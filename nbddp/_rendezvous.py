"""torchrun's rendezvous for one machine, as ``--rdzv-backend nbddp``.

torchrun loads this module, on every start and for everybody, through the entry-point group ``torchrun.handlers``, so
its own imports are light and torch's are made when a handler is asked for.

The ways that torchrun ships have two faults for a notebook. A port that was chosen, closed and handed on as a number
may be somebody else's when it is opened again. And ``--standalone`` listens on every interface with a store in which
the agents' state is pickled: who can reach the port can run code. This one binds port 0 of the loopback interface
itself, hands the open socket to the store, and keeps no state in it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

BACKEND = "nbddp"
LOOPBACK = "127.0.0.1"

_TIMEOUT = timedelta(seconds=900)  # torchrun's own default


def get_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return what makes a handler, as the entry-point group asks for it."""
    return _create_handler


def open_store(timeout: timedelta = _TIMEOUT) -> Any:
    """Return a ``torch.distributed.TCPStore`` that serves on a free port of the loopback interface."""
    from torch.distributed import TCPStore

    server = socket.create_server((LOOPBACK, 0), backlog=socket.SOMAXCONN)
    port = server.getsockname()[1]
    # The store owns the descriptor from here on.
    fd = server.detach()

    def store(**options: Any) -> Any:
        return TCPStore(
            LOOPBACK, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=fd, **options
        )

    try:
        return store()
    except NotImplementedError:
        # torch 2.6 and 2.7 cannot hand a socket to their default server; they refuse before touching it.
        return store(use_libuv=False)


def _create_handler(params: RendezvousParameters) -> RendezvousHandler:
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousStoreInfo,
    )

    class LoopbackRendezvous(RendezvousHandler):
        """One agent on one machine: there is nobody to wait for."""

        def __init__(self) -> None:
            self._store: Any = None

        def get_backend(self) -> str:
            return BACKEND

        @property
        def use_agent_store(self) -> bool:
            return True

        def next_rendezvous(self) -> RendezvousInfo:
            # Asked again before a restart: a new store, since the keys of the last attempt would mislead the ranks.
            self._store = open_store()
            return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            pass

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return params.run_id

        def shutdown(self) -> bool:
            # Called twice by torch 2.6 and 2.7. The store goes with the agent's process.
            return True

    if params.max_nodes != 1:
        raise ValueError(f"--rdzv-backend {BACKEND} is for one node, not for --nnodes {params.max_nodes}")
    return LoopbackRendezvous()
