"""Which notebooks are tested: all but those for which something is not there, and that is said at the end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.cluster import Slurm, why_no_slurm

_ON_SLURM = "13_two_nodes.ipynb"

collect_ignore = []
_why = {}
_started: list[Slurm] = []


def _can_import_ultralytics() -> bool:
    if importlib.util.find_spec("ultralytics") is None:
        return False
    try:
        # Its wheel may be there and not load: it must have been built for the same torch.
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _leave_out(name: str, why: str) -> None:
    collect_ignore.append(name)
    _why[name] = why


if not _can_import_ultralytics():
    _leave_out("07_ultralytics.ipynb", "takes ultralytics (saved with 8.4.190) and torchvision")
if why := why_no_slurm():
    _leave_out(_ON_SLURM, f"takes a Slurm; {why}")


def pytest_configure() -> None:
    """Start a Slurm of two nodes, which the notebooks' kernels inherit."""
    if _ON_SLURM not in collect_ignore:
        slurm = Slurm(Path(tempfile.mkdtemp(prefix="slurm-")))
        _started.append(slurm)
        os.environ.update({name: value for name, value in slurm.env.items() if value is not None})


def pytest_unconfigure() -> None:
    """End it."""
    while _started:
        slurm = _started.pop()
        slurm.close()
        shutil.rmtree(slurm.folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left out."""
    for name in collect_ignore:
        terminalreporter.write_line(f"NOT TESTED: notebooks/{name} {_why[name]}", yellow=True)
