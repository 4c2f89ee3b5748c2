"""Run notebooks anew and save what they show: ``python -m tests.save_notebooks notebooks/*.ipynb``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def save(path: Path) -> None:
    """Run one notebook in its folder; without times in it, so that only what readers see makes a difference."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if "ultralytics" in name and importlib.util.find_spec("ultralytics") is None:
            print(f"NOT SAVED: {name} takes ultralytics")
            continue
        save(Path(name))
