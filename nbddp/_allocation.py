"""The runs of this kernel that outlive a cell, and their GPUs, which another run shares only when asked to."""

from __future__ import annotations

from collections.abc import Sequence

# By whom they are held: the GPUs, as the driver knows them, and what the user reads of the holder.
_held: dict[object, tuple[Sequence[str], str]] = {}


def take(holder: object, gpus: Sequence[str], who: str) -> None:
    """Note that there is one more, and what it uses.

    Args:
        holder: Whoever will release them.
        gpus: The GPUs, as the driver knows them; there may be none.
        who: What the user reads of the holder, and how to end it.
    """
    _held[holder] = (gpus, who)


def release(holder: object) -> None:
    """Note that a holder has ended; nothing, if it is not known."""
    _held.pop(holder, None)


def holders() -> list[str]:
    """Return who there is, as the user reads it: all of these would end with the launcher."""
    return [who for _, who in list(_held.values())]


def in_use() -> dict[str, str]:
    """Return the GPUs that are used, and who uses each."""
    return {gpu: who for gpus, who in list(_held.values()) for gpu in gpus}
