"""A rank's device and process group, and the way in which the user's own ``init_process_group`` takes over.

nbddp's own group meets in a file of the run directory: on a port, any user of the machine could read and change what
the ranks tell each other. There is a store on MASTER_PORT only once somebody connects to it; see `nbddp._rendezvous`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from nbddp import _peers
from nbddp._paths import RunDir

# nbddp's keys in torchrun's store, where the script runs without a notebook. With torch's own prefix, a group that the
# cell makes for itself after nbddp's was destroyed would read the addresses of the old one.
_PREFIX = "nbddp"

_ours: Any = None

# Kept for as long as the process lives: a FileStore that goes writes to its file once more, and if the run's directory
# has just been deleted it waits for that as long as its timeout says.
_store: Any = None

# Of each group that gloo has connected: its store, and a key for each member, which is there when it has joined.
_joined: list[tuple[Any, list[str]]] = []

# Seconds to wait for members of a group that are about to join it. They are connected; on a busy machine they may have
# to wait for a core.
_JOIN_SECONDS = 30.0


class CannotForkError(Exception):
    """CUDA cannot be initialised in this rank because it was forked; a new process could."""


def own_device(gpus: bool, *, forked: bool) -> torch.device:
    """Make the rank's own device the current one and return it.

    Raises:
        CannotForkError: The driver was initialised before the fork, by whomever.
    """
    if not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    try:
        # For real, now: torch only knows of its own initialisation, not of a raw cuInit by another library.
        torch.cuda.init()
        torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        if forked:
            raise CannotForkError(str(error)) from error
        raise
    return device


def init(backend: str | None, device: torch.device, run_dir: RunDir | None, place: int | None = None) -> None:
    """Initialise the default process group.

    Args:
        backend: Its backend; None for the one that suits the device.
        device: The rank's own.
        run_dir: The run's files, in which the ranks of one machine meet; None to meet as torchrun's environment says.
        place: The number of the meeting place; that of torchrun's attempt by default.
    """
    global _ours, _store
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    prefix = _PREFIX
    if run_dir is not None and os.environ["GROUP_WORLD_SIZE"] == "1":
        if place is None:
            place = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        store: Any = dist.FileStore(run_dir.meeting_place(place), world_size)
        store.set_timeout(distributed_c10d.default_pg_timeout)
    else:
        store, rank, world_size = next(dist.rendezvous("env://"))
        if place is not None:
            # The keys of the group before would mislead this one.
            prefix = f"{_PREFIX}/{place}"
    _store = store
    # Bound to its device, NCCL neither guesses one at the first barrier nor warns that it did.
    bound = {"device_id": device} if device.type == "cuda" and "nccl" in backend else {}
    distributed_c10d._nbddp_original(  # type: ignore[attr-defined]  # see let_user_take_over
        backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world_size, **bound
    )
    _ours = dist.group.WORLD


def let_user_take_over() -> None:
    """Have a call of ``init_process_group`` destroy nbddp's group first, so that tutorials run unchanged.

    To be called before the closure is loaded: functions of the notebook that imported the name are pickled with a
    reference to it.
    """
    original = distributed_c10d.init_process_group
    if hasattr(distributed_c10d, "_nbddp_original"):
        return

    @functools.wraps(original)
    def init_process_group(*args: Any, **kwargs: Any) -> None:
        release()
        original(*args, **kwargs)

    distributed_c10d._nbddp_original = original  # type: ignore[attr-defined]
    distributed_c10d.init_process_group = init_process_group
    dist.init_process_group = init_process_group


def look_after_new_groups() -> None:
    """Have every process group that is made see that its new connections are this user's, and say that it is made.

    See `nbddp._peers` and `wait_for_who_joins`.
    """
    original = distributed_c10d._new_process_group_helper

    @functools.wraps(original)
    def new_process_group(*args: Any, **kwargs: Any) -> Any:
        before = _peers.connections()
        made = original(*args, **kwargs)
        _peers.refuse_strangers(_peers.connections() - before)
        _say_joined(*made)
        return made

    distributed_c10d._new_process_group_helper = new_process_group


def _say_joined(group: Any, store: Any) -> None:
    # Other backends connect when they are first used; and who is no member has no store.
    if store is not None and "gloo" in dist.get_backend_config(group):
        keys = [f"nbddp joined {rank}" for rank in range(group.size())]
        with contextlib.suppress(RuntimeError):  # it cannot be written to
            store.set(keys[group.rank()], "")
            _joined.append((store, keys))


def wait_for_who_joins() -> None:
    """Wait until gloo has made the groups of this rank in the other members, too.

    Of two that connect to each other one is done when it has sent its word, the other when it has read it. If the first
    closes the connection before that, since its cell is a short one, the second cannot make its group.

    To be called while the notebook still waits for this rank: it deletes the store with the run's directory, and torch
    would look for that for minutes.
    """
    deadline = time.monotonic() + _JOIN_SECONDS
    for store, keys in _joined:
        with contextlib.suppress(RuntimeError):  # a store of the cell's own that is gone
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.02)
    _joined.clear()


def release() -> None:
    """Destroy the default group if it is still nbddp's."""
    global _ours
    if _ours is not None and dist.is_initialized() and dist.group.WORLD is _ours:
        wait_for_who_joins()
        dist.destroy_process_group()
    _ours = None


def destroy() -> None:
    """Destroy whatever groups the cell leaves."""
    global _ours
    _ours = None
    if dist.is_initialized():
        dist.destroy_process_group()


def backend() -> str:
    """Return the backend of the default group; an empty string if there is none."""
    return str(dist.get_backend()) if dist.is_available() and dist.is_initialized() else ""


def make_anew(backend: str, device: str, run_dir: RunDir, place: int) -> None:
    """Make the default group anew, and DDP modules on it; other groups are gone.

    Args:
        backend: Its backend.
        device: The name of the rank's own device.
        run_dir: The run's files, in which the ranks meet.
        place: The number of the meeting place.
    """
    wrappers = _wrappers_on_default_group()
    _joined.clear()
    if dist.is_initialized():
        abort = getattr(distributed_c10d, "_abort_process_group", None)
        if "nccl" in dist.get_backend() and abort is not None:
            # To destroy one would wait for what is still queued on the device.
            abort()
        else:
            dist.destroy_process_group()
    init(backend, torch.device(device), run_dir, place)
    for wrapper, state in wrappers:
        # As when it is unpickled: with new buckets and hooks, on the default group.
        wrapper.__setstate__(state)


def _wrappers_on_default_group() -> list[tuple[Any, Any]]:
    """Return the DDP modules that there are on the default group, each with its state."""
    found = []
    for obj in gc.get_objects():
        if type(obj) is torch.nn.parallel.DistributedDataParallel:
            with contextlib.suppress(RuntimeError):  # one on a group of its own, which is lost
                found.append((obj, obj.__getstate__()))
    return found
