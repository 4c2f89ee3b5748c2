"""The backends of process groups that torch has here, and what is said of one that it has not."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from nbddp._errors import LaunchError


def available() -> list[str]:
    """Return the backends that this process's torch has, those included that others have registered; imports torch."""
    import torch.distributed as dist

    if not dist.is_available():
        return []
    names = [str(name) for name in dist.Backend.backend_list if name != "undefined"]
    # Of those that others have registered it is only known that they are there.
    return [name for name in names if getattr(dist, f"is_{name}_available", lambda: True)()]


def check(backend: str, there: Sequence[str], *, gpus: bool) -> None:
    """Refuse a backend that ranks could not make a process group with.

    Args:
        backend: As ``init_process_group`` takes it: a name, or several by device, as in ``cpu:gloo,cuda:nccl``.
        there: What `available` returned where ranks are started.
        gpus: Whether the ranks have GPUs.

    Raises:
        LaunchError: torch has none of that name, or it is for GPUs and there are none.
    """
    for part in backend.split(","):
        name = part.rpartition(":")[2].strip().lower()
        if name not in there:
            close = difflib.get_close_matches(name, there, 1)
            hint = f"Did you mean {close[0]}?" if close else "Without --backend it is nccl on GPUs and gloo on the CPU"
            raise LaunchError(f"--backend {backend}: torch has {_listed(there)} here, and no {name!r}. {hint}")
        if name == "nccl" and not gpus and ":" not in part:
            raise LaunchError(
                f"--backend {backend}: NCCL is for GPUs, and these ranks are on the CPU; leave it to gloo"
            )


def _listed(names: Sequence[str]) -> str:
    # "fake" is there for torch's own tests, once something has imported them.
    return ", ".join(name for name in names if name != "fake") or "no backend"
