"""JupyterLab in a browser: what a person sees, presses and saves."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Literal

import psutil
import pytest

from tests.cluster import Slurm
from tests.lab import Lab, LabNotebook

LOAD = "%load_ext nbddp"
FINE = "%%ddp --cpus 2\nprint('fine')"
SLEEP = "%%ddp --cpus 2\nimport os, time\nprint('pid', os.getpid())\ntime.sleep(600)"

# Seconds in which a stop must have done its work. One takes about half of one; this is not a speed test.
SOON = 5.0


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where pictures of the page go: a folder of the test's, or NBDDP_SCREENSHOTS to look at them."""
    return Path(os.environ.get("NBDDP_SCREENSHOTS", str(tmp_path)))


def lines(notebook: LabNotebook, cell: int) -> list[str]:
    """Return the lines of a cell's output area in sorted order: ranks print in any."""
    return sorted(notebook.text(cell).splitlines())


def sleeping(lab: Lab) -> tuple[LabNotebook, list[int]]:
    """Return a notebook whose second cell runs on two ranks that sleep, and the ranks' process ids."""
    notebook = lab.open([LOAD, SLEEP, FINE])
    notebook.ok(0)
    notebook.start(1)
    notebook.until(1, r"c => (c.text.match(/\] pid \d+/g) || []).length === 2")
    pids = [int(pid) for pid in re.findall(r"\] pid (\d+)", notebook.text(1))]
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
    assert "ranks 0-1: on line 4 of the cell: time.sleep(600)" in notebook.text(1)
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
    assert run.stall < 5  # half a second where nothing else runs
    began = time.monotonic()
    notebook.select(0)  # a click is answered
    assert time.monotonic() - began < 3
    shown = notebook.text(1).splitlines()
    assert shown[0] == "[rank 0] line 0"
    assert shown[-1] == "[rank 0] line 99999"
    assert any(line.startswith("…") and line.endswith("of rank 0 not shown; %ddp log --rank 0") for line in shown)
    notebook.save()
    assert notebook.path.stat().st_size < 2_000_000


def test_a_run_in_the_background(lab: Lab) -> None:
    steps = "%%ddp --cpus 2 --bg train\nimport time\nfor i in range(8):\n    print('step', i)\n    time.sleep(0.5)"
    notebook = lab.open([LOAD, steps, "import time\nprint('mine')\ntime.sleep(2)", "train", "train.wait()"])
    notebook.ok(0)
    notebook.ok(1)
    notebook.start(2)
    notebook.until_text(1, "[rank 0] step 1")  # while that cell runs
    notebook.until(1, "c => c.area.querySelectorAll('details, table, div').length > 0 && c.outputs.length > 1")
    notebook.wait(2)
    notebook.ok(3)
    notebook.until_text(1, "[rank 1] step 7")  # while no cell runs
    notebook.until_text(1, "nbddp: train: 2 ranks, done")
    assert notebook.text(2).strip() == "mine"
    notebook.until_text(3, "nbddp: 2 ranks done in")  # the handle's panel
    assert notebook.count(3) == 1
    notebook.ok(4)
    saved = notebook.save()
    assert "step 7" in str(saved.cells[1].outputs)
    assert "step" not in saved.cells[2].outputs[0].text


def test_a_restart_with_a_run_in_the_background(lab: Lab) -> None:
    notebook = lab.open([LOAD, SLEEP.replace("--cpus 2", "--cpus 2 --bg train"), FINE])
    notebook.ok(0)
    notebook.ok(1)
    notebook.until(1, r"c => (c.text.match(/\] pid \d+/g) || []).length === 2")
    pids = [int(pid) for pid in re.findall(r"\] pid (\d+)", notebook.text(1))]
    notebook.restart()
    assert_gone(pids, SOON)
    logs = notebook.path.parent / "nbddp-logs" / "train-1"
    assert {f"pid {pid}\n" for pid in pids} == {log.read_text() for log in logs.iterdir()}
    notebook.ok(0)
    assert notebook.text(0).strip() == "nbddp: train ended with the kernel; its logs are in nbddp-logs/train-1"
    notebook.ok(2)
    assert {"[rank 0] fine", "[rank 1] fine"} <= set(lines(notebook, 2))


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


TRAINING = """%%ddp --cpus 4
import time
import torch, torch.distributed as dist
from tqdm.auto import trange

for step in trange(24, desc="training"):
    time.sleep(0.1 + 0.02 * rank)
    if step % 8 == 7:
        print(f"step {step + 1}: loss {2 / (step + rank + 1):.3f}")
    if step == 11:
        total = torch.ones(1)
        dist.all_reduce(total)
if rank == 3:
    time.sleep(1)
dist.barrier()
"""
HANGS = """%%ddp --cpus 4
import time, torch.distributed as dist
print("ready")
if rank == 1:
    time.sleep(600)
dist.barrier()
"""


ON_NODES = TRAINING.split("\n", 1)[1]
ON_NODES = f"%%ddp --nnodes 2 --cpus 2\n{ON_NODES}".replace("dist.barrier()\n", "")


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_a_training_run(lab: Lab, theme: Literal["JupyterLab Light", "JupyterLab Dark"], screenshots: Path) -> None:
    lab.theme(theme)
    notebook = lab.open([LOAD, TRAINING, HANGS])
    notebook.ok(0)
    notebook.start(1)
    # The panel moves: real bars, of all ranks, that are further than at the start.
    notebook.until(1, "c => c.area.querySelectorAll('progress').length === 4")
    bars = "Array.from(c.area.querySelectorAll('progress')).map(bar => bar.value)"
    notebook.until(1, f"c => {bars}.every(value => value > 0.1)")
    notebook.until(1, f"c => {bars}.length === 4 && {bars}.every(value => value > 0.5)")
    assert notebook.visible(1, "progress")
    notebook.screenshot(1, screenshots / f"running-{theme.split()[1].lower()}.png")
    notebook.until(1, "c => c.text.includes('waiting in barrier')")
    notebook.wait(1)
    notebook.until(1, "c => c.area.querySelectorAll('progress').length === 0")
    text = notebook.text(1)
    assert re.search(r"nbddp: 4 ranks done in \d s", text)
    assert text.count("training: 100%") >= 4
    assert notebook.count(1) <= 4
    notebook.screenshot(1, screenshots / f"done-{theme.split()[1].lower()}.png")
    # The fold of a rank opens, and stays open.
    notebook.click(1, "summary")
    notebook.click(1, "details details summary")
    assert notebook.visible(1, "details details pre")
    notebook.start(2)
    notebook.until(2, "c => c.text.includes('waiting in barrier')")
    notebook.press_interrupt()
    notebook.wait(2)
    assert "KeyboardInterrupt" in notebook.text(2)
    assert "nbddp: 4 ranks interrupted after" in notebook.text(2)
    notebook.screenshot(2, screenshots / f"interrupted-{theme.split()[1].lower()}.png")
    saved = notebook.save()
    panels = [o for o in saved.cells[1].outputs if o.output_type == "display_data"]
    assert len(panels) == 1
    assert panels[0].data["text/plain"].startswith("nbddp: 4 ranks done in")
    # As a reader sees it who does not trust it: sanitised, the panel says the same.
    if theme == "JupyterLab Light":
        saved.metadata["copy"] = True
        copy = lab.open_file(saved)
        assert not copy.trusted(1)
        assert "nbddp: 4 ranks done in" in copy.text(1)
        copy.click(1, "summary")
        assert copy.visible(1, "details details")


def test_a_run_on_nodes(lab: Lab, slurm: Slurm, screenshots: Path) -> None:
    environment = {name: value for name, value in slurm.env.items() if value is not None}
    notebook = lab.open([f"import os\nos.environ.update({environment!r})\n{LOAD}", ON_NODES])
    notebook.ok(0)
    notebook.start(1)
    bars = "Array.from(c.area.querySelectorAll('progress')).map(bar => bar.value)"
    notebook.until(1, f"c => {bars}.length === 4 && {bars}.every(value => value > 0.4)", timeout=90)
    rows = [line for line in notebook.text(1).splitlines() if "rank" in line]
    assert any(re.match(r"node0 \(.*\)\s+rank 0", row) for row in rows), rows
    notebook.screenshot(1, screenshots / "nodes.png")
    notebook.wait(1)
    assert re.search(r"nbddp: 4 ranks on 2 nodes done in \d+ s", notebook.text(1))
