"""Every row of the table in docs/faults.md, in a real kernel, with two and with four ranks.

``NBDDP_WRITE_FAULTS=docs/faults.md pytest tests/test_fault_matrix.py`` writes the table anew, with the times taken.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults import ROWS, Fault
from tests.kernel import Kernel, Reply
from tests.test_lifecycle import SHELL_STATE, launcher_of
from tests.test_processes import is_alive

TABLE = Path(__file__).parent.parent / "docs" / "faults.md"


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[tuple[Fault, int], tuple[float, float, list[str]]]]:
    """For each row and number of ranks: seconds until the prompt was back, until nothing was left; lines shown."""
    found: dict[tuple[Fault, int], tuple[float, float, list[str]]] = {}
    yield found
    if path := os.environ.get("NBDDP_WRITE_FAULTS"):
        text = Path(path).read_text()
        begin, end = "<!-- rows -->\n", "<!-- end -->"
        Path(path).write_text(text[: text.index(begin) + len(begin)] + _table(found) + text[text.index(end) :])


def _table(found: dict[tuple[Fault, int], tuple[float, float, list[str]]]) -> str:
    lines = []
    for group in dict.fromkeys(row.group for row in ROWS):
        lines += [f"### {group}", "", "| what happens | what the notebook shows | prompt back |", "|---|---|---|"]
        for row in (row for row in ROWS if row.group == group):
            times = [f"{found[row, ranks][0]:.2f} s" for ranks in row.ranks if (row, ranks) in found]
            shown = found.get((row, 2), (0, 0, []))[2]
            quoted = "<br>".join(f"`{_cut(line)}`" for line in shown)
            lines.append(f"| {row.name} | {quoted} | {' / '.join(times)} |")
        lines.append("")
    return "\n".join(lines)


def _cut(line: str) -> str:
    line = line.strip()
    return (line if len(line) <= 110 else f"{line[:109]}…").replace("|", "\\|")


def run(kernel: Kernel, row: Fault, ranks: int) -> tuple[Reply, float]:
    """Run a row's cell and do what is to be done; return the reply, and the seconds from that to the prompt."""
    acted: list[float] = []

    def act() -> None:
        acted.append(time.monotonic())
        if row.act:
            kernel.interrupt()
        if row.act == "interrupt twice":
            time.sleep(0.3)
            kernel.interrupt()

    code = f"%%ddp --cpus {ranks} {row.options}\n{row.cell}"
    if isinstance(row.when, float):
        reply = kernel.run_and_after(code, row.when, act)
    elif row.when:

        def when_all_are_up(reply: Reply, _: object) -> None:
            if not acted and reply.text.count(str(row.when)) >= ranks:
                time.sleep(0.1)  # the line behind that print
                act()

        reply = kernel.run(code, seen=when_all_are_up)
        assert acted, reply.text
    else:
        acted.append(time.monotonic())
        reply = kernel.run(code)
    return reply, time.monotonic() - acted[0]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_fault(
    kernel: Kernel,
    row: Fault,
    ranks: int,
    tmp_path: Path,
    left_behind: Callable[[], list[str]],
    measured: dict[tuple[Fault, int], tuple[float, float, list[str]]],
) -> None:
    kernel.ok(f"import os\nos.chdir({str(tmp_path)!r})\n%config DDPMagics.grace = {row.grace}")
    kernel.ok("%%ddp --cpus 1\npass")
    kernel.ok(SHELL_STATE)
    kernel.ok("state = shell_state()")
    if row.setup:
        kernel.ok(row.setup)
    reply, seconds = run(kernel, row, ranks)
    at_prompt = time.monotonic()
    while left := left_behind():
        assert time.monotonic() < at_prompt + 4, left
        time.sleep(0.02)
    gone = time.monotonic() - at_prompt
    assert reply.error == row.error, reply.traceback
    shown = [*reply.text.splitlines(), *reply.traceback.splitlines()]
    quoted = []
    for pattern in row.shows:
        found = [line for line in shown if re.fullmatch(pattern, line)]
        assert found, f"{pattern!r} is not in:\n" + "\n".join(shown)
        quoted.append(found[-1])
    assert seconds < row.within
    kernel.ok("%config DDPMagics.grace = 5")
    if row.checks:
        assert kernel.get(row.checks) is True
    # Nothing of the kernel's has changed: descriptors, threads, signal handlers, environment.
    keys = ("descriptors", "handlers", "threads", "environment")
    assert kernel.get(f"{{k: (state[k], shell_state()[k]) for k in {keys!r} if state[k] != shell_state()[k]}}") == {}
    assert kernel.ok("%%ddp --cpus 2\nprint('works')").lines == ["[rank 0] works", "[rank 1] works"]
    measured[row, ranks] = seconds, gone, quoted


@pytest.fixture
def little_memory(new_kernel: Callable[..., Kernel]) -> Iterator[Kernel]:
    """A kernel that, with all that it starts, may use 1.5 GB."""
    kernel = new_kernel()
    kernel.ok("%%ddp --cpus 1\npass")
    name = f"nbddp-test-{kernel.pid}"
    if Path("/sys/fs/cgroup/memory").is_dir():
        group, limit = Path("/sys/fs/cgroup/memory", name), "memory.limit_in_bytes"
    else:
        group, limit = Path("/sys/fs/cgroup", name), "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(3 << 29))
        for pid in (kernel.pid, launcher_of(kernel).pid):
            (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        pytest.skip(f"NOT TESTED: a process that the system kills for want of memory; making a cgroup fails: {error}")
    yield kernel
    kernel.close()
    deadline = time.monotonic() + 5
    while group.is_dir() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            group.rmdir()
        time.sleep(0.05)


def test_a_rank_that_is_killed_for_want_of_memory(little_memory: Kernel) -> None:
    reply = little_memory.run(
        "%%ddp --cpus 2\nimport time\nif rank == 1:\n    held = [bytearray(1 << 28) for _ in range(20)]\n"
        "    held = [bytes(b'x' * (1 << 28)) for _ in range(20)]\ntime.sleep(60)"
    )
    assert reply.message == "rank 1 of 2 was killed by signal 9 (SIGKILL)"
    assert "The system killed a process for want of memory during this run. Less data per rank" in reply.traceback
    assert little_memory.ok("%%ddp --cpus 2\nprint('works')").lines == ["[rank 0] works", "[rank 1] works"]


def test_a_kernel_that_is_killed_for_want_of_memory(little_memory: Kernel) -> None:
    little_memory.client.execute("%%ddp --cpus 2\nimport time\nprint('up', flush=True)\ntime.sleep(100)")
    deadline = time.monotonic() + 20
    while len(processes := psutil.Process(little_memory.pid).children(recursive=True)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher = launcher_of(little_memory)
    # As a notebook that loads too much does, while a run goes on: the kernel is the largest process then.
    Path(f"/proc/{little_memory.pid}/oom_score_adj").write_text("1000")
    hog = subprocess.Popen([sys.executable, "-c", "import os, sys; input(); x = [b'x' * (1 << 28) for _ in range(20)]"],
                           stdin=subprocess.PIPE)  # fmt: skip
    group = next(
        line for line in Path(f"/proc/{little_memory.pid}/cgroup").read_text().splitlines() if "nbddp-test" in line
    )
    root = Path("/sys/fs/cgroup/memory") if "memory" in group else Path("/sys/fs/cgroup")
    (root / group.rpartition(":")[2].lstrip("/") / "cgroup.procs").write_text(str(hog.pid))
    hog.communicate(b"\n")
    deadline = time.monotonic() + 2
    while (alive := [p for p in (launcher, *processes) if is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive
    assert not little_memory.alive()


def test_the_table_has_every_row() -> None:
    text = TABLE.read_text()
    assert [row.name for row in ROWS if f"| {row.name} |" not in text] == []
