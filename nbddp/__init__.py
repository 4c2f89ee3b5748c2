"""Multi-GPU PyTorch from a notebook.

After ``%load_ext nbddp``, a cell that starts with ``%%ddp --gpus 4`` runs on four ranks under torchrun, on the
notebook's own variables. `launch` does the same for a function, in notebooks of any kind and in scripts; `RunOptions`
are the options of both.

Importing this package imports neither torch nor IPython.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# First of all: what it reads may not be there later.
from nbddp import _beginning  # noqa: F401  # read when it is imported
from nbddp._errors import (
    CaptureError,
    ExportError,
    LaunchError,
    NbddpError,
    RankError,
    ResultError,
    RunLostError,
    RunTimeout,
)

if TYPE_CHECKING:
    from nbddp._function import launch
    from nbddp._options import OptionError, RunOptions

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "ExportError",
    "LaunchError",
    "NbddpError",
    "OptionError",
    "RankError",
    "ResultError",
    "RunLostError",
    "RunOptions",
    "RunTimeout",
    "launch",
]


def __getattr__(name: str) -> Any:
    if name == "launch":
        from nbddp._function import launch

        return launch
    if name in ("OptionError", "RunOptions"):
        from nbddp import _options

        return getattr(_options, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_ipython_extension(shell: Any) -> None:
    """Add ``%%ddp`` and ``%ddp`` to a shell, and start the launcher in the background."""
    from nbddp import _loading

    _loading.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Take the magics away again, and end the launcher and all that it runs."""
    from nbddp import _loading

    _loading.unload(shell)
