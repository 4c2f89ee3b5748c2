"""Which notebooks are tested: all but one whose libraries are not there, and that is said at the end."""

from __future__ import annotations

import importlib.util

import pytest

collect_ignore = []


def _can_import_ultralytics() -> bool:
    if importlib.util.find_spec("ultralytics") is None:
        return False
    try:
        # Its wheel may be there and not load: it must have been built for the same torch.
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


if not _can_import_ultralytics():
    collect_ignore.append("07_ultralytics.ipynb")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left out."""
    for name in collect_ignore:
        terminalreporter.write_line(
            f"NOT TESTED: notebooks/{name} takes ultralytics (saved with 8.4.190) and torchvision", yellow=True
        )
