"""JupyterLab in a browser: what a person sees, presses and saves."""

from __future__ import annotations

import re
import time

import psutil
import pytest

from tests.lab import Lab, LabNotebook

LOAD = "%load_ext nbddp"
FINE = "%%ddp --cpus 2\nprint('fine')"
SLEEP = "%%ddp --cpus 2\nimport os, time\nprint('pid', os.getpid())\ntime.sleep(600)"

# Seconds in which a stop must have done its work. One takes about half of one; this is not a speed test.
SOON = 5.0


def lines(notebook: LabNotebook, cell: int) -> list[str]:
    """Return the lines of a cell's output area in sorted order: ranks print in any."""
    return sorted(notebook.text(cell).splitlines())


def sleeping(lab: Lab) -> tuple[LabNotebook, list[int]]:
    """Return a notebook whose second cell runs on two ranks that sleep, and the ranks' process ids."""
    notebook = lab.open([LOAD, SLEEP, FINE])
    notebook.ok(0)
    notebook.start(1)
    notebook.until(1, r"c => (c.text.match(/pid \d+/g) || []).length === 2")
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", notebook.text(1))]
    assert all(psutil.pid_exists(pid) for pid in pids)
    return notebook, pids


def assert_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def test_lines_of_both_ranks(lab: Lab) -> None:
    notebook = lab.open([LOAD, FINE])
    notebook.ok(0)
    run = notebook.ok(1)
    assert lines(notebook, 1) == ["[rank 0] fine", "[rank 1] fine"]
    assert run.changes > 0
    assert notebook.visible(1)
    assert notebook.error(1) == ""


@pytest.mark.parametrize("press", ["button", "keys"])
def test_stop(lab: Lab, press: str) -> None:
    notebook, pids = sleeping(lab)
    if press == "button":
        notebook.press_interrupt()
    else:
        notebook.press_i_i(1)
    run = notebook.wait(1, timeout=SOON)
    assert run.status == "error"
    assert notebook.error(1) == "KeyboardInterrupt"
    assert "rank 1: on line 4 of the cell" in notebook.text(1)
    assert_gone(pids, 1)
    notebook.ok(2)
    assert lines(notebook, 2) == ["[rank 0] fine", "[rank 1] fine"]


def test_restart_of_the_kernel(lab: Lab) -> None:
    notebook, pids = sleeping(lab)
    notebook.restart()
    assert_gone(pids, SOON)
    notebook.ok(0)
    notebook.ok(2)
    assert lines(notebook, 2) == ["[rank 0] fine", "[rank 1] fine"]


def test_a_flood(lab: Lab) -> None:
    notebook = lab.open([LOAD, "%%ddp --cpus 2\nif rank == 0:\n    for i in range(100_000):\n        print('line', i)"])
    notebook.ok(0)
    run = notebook.ok(1)
    assert run.stall < 3
    began = time.monotonic()
    notebook.select(0)  # a click is answered
    assert time.monotonic() - began < 3
    shown = notebook.text(1).splitlines()
    assert shown[0] == "[rank 0] line 0"
    assert shown[-1] == "[rank 0] line 99999"
    assert any(line.startswith("nbddp:") and "are left out here; %ddp log 0 has them all" in line for line in shown)
    notebook.save()
    assert notebook.path.stat().st_size < 2_000_000


def test_what_is_saved_outlives_the_page(lab: Lab) -> None:
    notebook = lab.open([LOAD, FINE])
    notebook.ok(0)
    notebook.ok(1)
    before = notebook.outputs(1)
    assert [dict(output) for output in notebook.save().cells[1].outputs] == before
    notebook.reload()
    assert notebook.outputs(1) == before
    assert lines(notebook, 1) == ["[rank 0] fine", "[rank 1] fine"]
    notebook.ok(1)  # on the same kernel


def test_a_copy_that_is_not_trusted(lab: Lab) -> None:
    notebook = lab.open([LOAD, FINE])
    notebook.ok(0)
    notebook.ok(1)
    assert notebook.trusted(1)
    content = notebook.save()
    content.metadata["came"] = "by mail"
    copy = lab.open_file(content)
    assert not copy.trusted(1)
    assert lines(copy, 1) == ["[rank 0] fine", "[rank 1] fine"]
