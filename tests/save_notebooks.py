"""Run notebooks anew and save what they show: ``python -m tests.save_notebooks notebooks/*.ipynb``."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.cluster import Slurm, why_no_slurm


def save(path: Path) -> None:
    """Run one notebook in its folder; without times in it, so that only what readers see makes a difference."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(notebook, path)


def save_on_slurm(path: Path) -> None:
    """Do so beside a Slurm of two nodes."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        slurm = Slurm(Path(folder))
        try:
            os.environ.update({name: value for name, value in slurm.env.items() if value is not None})
            save(path)
        finally:
            slurm.close()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if "ultralytics" in name and importlib.util.find_spec("ultralytics") is None:
            print(f"NOT SAVED: {name} takes ultralytics")
        elif "two_nodes" in name and (why := why_no_slurm()):
            print(f"NOT SAVED: {name} takes a Slurm; {why}")
        elif "two_nodes" in name:
            save_on_slurm(Path(name))
        else:
            save(Path(name))
