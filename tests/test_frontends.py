"""Front ends other than JupyterLab: what runs a notebook by itself, a terminal, and the rules that all have."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pyte
import pytest
from nbclient import NotebookClient

from tests.kernel import Kernel

BARS = """import time
from tqdm import trange
for step in trange(16, desc='steps'):
    time.sleep(0.1)
    if step % 8 == 7:
        print('step', step + 1)
"""


def notebook_of(*cells: str) -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    return notebook


def stream_of(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


# What runs a notebook by itself.


def by_nbclient(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=60, record_timing=False).execute(cwd=str(path.parent))
    return notebook


def by_nbconvert(path: Path) -> nbformat.NotebookNode:
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--output", "done.ipynb", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=90)
    return nbformat.read(path.parent / "done.ipynb", as_version=4)


def by_papermill(path: Path) -> nbformat.NotebookNode:
    target = path.parent / "done.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(path), str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=90, cwd=path.parent)
    return nbformat.read(target, as_version=4)


@pytest.mark.parametrize("run", [by_nbclient, by_nbconvert, by_papermill])
def test_what_is_saved(run: Callable[[Path], nbformat.NotebookNode], tmp_path: Path) -> None:
    path = tmp_path / "with spaces.ipynb"
    nbformat.write(notebook_of("%load_ext nbddp", f"%%ddp --cpus 2\n{BARS}"), path)
    outputs = run(path).cells[-1].outputs
    panels = [output for output in outputs if output.output_type == "display_data"]
    assert len(panels) == 1
    assert re.fullmatch(r"nbddp: 2 ranks done in \d s", panels[0].data["text/plain"])
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert text.count("100%") == 2
    assert "\r" not in text
    assert len(text.splitlines()) == 6
    assert len(outputs) < 20
    assert not any(output.output_type == "error" for output in outputs)


def test_nbval_compares_plain_output_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDDP_PLAIN", "1")
    path = tmp_path / "book.ipynb"
    cell = "%%ddp --cpus 2\nimport time\nfor i in range(4):\n    time.sleep(0.3 + 0.1 * rank)\n    print(rank, i)\nrank"
    nbformat.write(notebook_of("%load_ext nbddp", cell), path)
    notebook = by_nbclient(path)
    ranks = [f"[rank {r}] {r} {i}\n" for r in range(2) for i in range(4)]
    assert stream_of(notebook.cells[-1]) == "".join([*ranks, "[rank 1] 1\n"])
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", str(path)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout


# A terminal.


class Shell:
    """IPython in a terminal of 30 lines, read by an emulator that is not nbddp's own."""

    def __init__(self) -> None:
        pid, self._fd = pty.fork()
        if pid == 0:
            os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "30", "NO_COLOR": "1"}
            os.execv(
                sys.executable, [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor"]
            )
        self.pid = pid
        self._screen = pyte.HistoryScreen(100, 30, history=1000)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""

    def type(self, line: str) -> None:
        os.write(self._fd, line.encode() + b"\n")

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text
            if select.select([self._fd], [], [], 0.05)[0]:
                data = os.read(self._fd, 1 << 16)
                self.raw += data
                self._stream.feed(data)

    @property
    def text(self) -> str:
        above = ["".join(line[x].data for x in range(100)).rstrip() for line in self._screen.history.top]
        return "\n".join([*above, *(line.rstrip() for line in self._screen.display)]).rstrip()

    def close(self) -> None:
        self.type("exit")
        deadline = time.monotonic() + 20
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.close(self._fd)


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.close()


def test_a_terminal_has_the_panel_below_the_text(shell: Shell) -> None:
    shell.until(lambda: "In [1]" in shell.text)
    shell.type("%load_ext nbddp")
    shell.until(lambda: "In [2]" in shell.text)
    shell.type(f"get_ipython().run_cell_magic('ddp', '--cpus 2', {BARS!r})")
    shell.until(lambda: re.search(r"rank 1  running, line \d .*%, +\d+/16", shell.text) is not None)
    shell.until(lambda: "In [3]" in shell.text)
    shown = shell.text[shell.text.rindex("In [2]") : shell.text.rindex("In [3]")]
    assert "running" not in shown  # the panel is gone
    lines = [line for line in shown.splitlines() if re.match(r"[\[(]rank|nbddp:", line)]
    assert sorted(line[:16] for line in lines[:-1]) == [
        *("(rank 0) steps: ", "(rank 1) steps: ", "[rank 0] step 16", "[rank 0] step 8"),
        *("[rank 1] step 16", "[rank 1] step 8"),
    ]
    assert sum("steps: 100%" in line for line in lines) == 2
    assert re.fullmatch(r"nbddp: 2 ranks done in \d s", lines[-1])


def test_what_is_piped_is_plain(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import nbddp\n\ndef work():\n    import os, time\n    for i in range(3):\n        time.sleep(0.5)\n"
        "        print('rank', os.environ['RANK'], i)\n\nnbddp.launch(work, cpus=2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90, check=True)
    assert done.stdout == "".join(f"[rank {r}] rank {r} {i}\n" for r in range(2) for i in range(3))


# The rules of all front ends that have a Jupyter server in between: what comes too fast is dropped.


def test_what_a_server_lets_through(kernel: Kernel) -> None:
    """Four chatty ranks with bars, and right after them two floods."""
    sent: list[tuple[float, str, int]] = []
    cells = [
        "%%ddp --cpus 4\nimport time\nfrom tqdm import tqdm\nfor i in tqdm(range(200)):\n    time.sleep(0.01)\n"
        "    for j in range(10): print(i, 'x' * 80)",
        *["%%ddp --cpus 2\nfor i in range(100_000): print(i, 'é' * 40)"] * 2,
    ]
    for cell in cells:
        assert kernel.run_timed(cell, sent).status == "ok"
    for start, _, _ in sent:
        window = [(kind, size) for at, kind, size in sent if start <= at < start + 3]
        # The server's limits are 1 MB/s and 1000 messages/s, over three seconds.
        assert sum(size for kind, size in window if kind == "stream") < 3_000_000
        assert len(window) < 300
        assert sum(kind == "update_display_data" for kind, _ in window) <= 15


def test_what_a_chatty_run_leaves_in_the_notebook(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%config DDPMagics.output = 100_000\nget_ipython().run_cell_magic('ddp', '--cpus 2', "
        "'for i in range(100_000): print(i)')"
    )
    kernel.ok("%config DDPMagics.output = 800_000")
    assert 50_000 < len(reply.text) < 101_000
    assert reply.text.count("not shown; %ddp log --rank") == 2
