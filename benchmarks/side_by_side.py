"""What the benchmarks share: kernels, tables, and how a ratio is taken."""

from __future__ import annotations

import collections
import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import start_new_kernel

IMPORTS = "import os, time, torch, torch.distributed as dist\n"


@dataclass
class Table:
    """A table of results, printed as Markdown."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))]

        def line(cells: tuple[str, ...]) -> str:
            return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

        ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([f"### {self.title}", "", line(self.head), ruler, *map(line, self.rows), ""])


def rounds_table(
    title: str, seed: int, numbers: range, play: Callable[[int], Any], show: Callable[[object], None]
) -> Table:
    """Play rounds (`tests.rounds`), show each, and return how many have failed at which stage.

    Args:
        title: What the table is called.
        seed: What the rounds are drawn from.
        numbers: Which of them.
        play: Plays a round; returns a `tests.rounds.Result`.
        show: Shows a line.
    """
    show(f"seed {seed}")
    counts: collections.Counter[tuple[str, bool]] = collections.Counter()
    failed = []
    for number in numbers:
        result = play(number)
        show(result)
        counts[result.plan.stage, bool(result.problems)] += 1
        if result.problems:
            failed.append(number)
    table = Table(f"{title}, seed {seed}", ("stage", "rounds", "failed", "goal"))
    for stage in sorted({stage for stage, _ in counts}):
        bad = counts[stage, True]
        table.rows.append((stage, str(counts[stage, False] + bad), str(bad), "0"))
    table.rows.append(("in all", str(len(numbers)), str(len(failed)), "0"))
    if failed:
        show(f"failed: {', '.join(f'--seed {seed} --only {number}' for number in failed)}")
    return table


class Kernel:
    """A Jupyter kernel with torch imported, as a notebook has it."""

    def __init__(self) -> None:
        self._manager, self._client = start_new_kernel(kernel_name="python3", extra_arguments=["--log-level=ERROR"])
        provisioner: Any = self._manager.provisioner
        self.pid: int = provisioner.pid

    def run(self, code: str, on_output: Callable[[str], None] = lambda _: None) -> tuple[float, str]:
        """Run a cell; return the seconds from the request to idle, and what it printed."""
        text = []

        def collect(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                text.append(content["text"])
                on_output(content["text"])
            elif message["msg_type"] == "error":
                raise RuntimeError("\n".join(content["traceback"]))

        began = time.perf_counter()
        self._client.execute_interactive(code, output_hook=collect, timeout=300, allow_stdin=False)
        return time.perf_counter() - began, "".join(text)

    def warm_up(self) -> None:
        """Load the extension and wait until the launcher has imported everything."""
        self.run(IMPORTS + "%load_ext nbddp")
        launcher = psutil.Process(self.pid).children()[0]
        before = -1.0
        while launcher.cpu_times().user != before:
            before = launcher.cpu_times().user
            time.sleep(0.5)

    def close(self) -> None:
        """Shut the kernel down."""
        self._client.stop_channels()
        self._manager.shutdown_kernel()


@contextlib.contextmanager
def kernel() -> Iterator[Kernel]:
    """Start a kernel and close it."""
    one = Kernel()
    try:
        yield one
    finally:
        one.close()


def ratio_row(name: str, ours: list[float], bare: list[float], goal: str) -> tuple[str, ...]:
    """Return a row with both medians, their ratio, and the spread of the ratio from pair to pair."""
    pairs = sorted(a / b for a, b in zip(ours, bare, strict=True))
    ratio = statistics.median(ours) / statistics.median(bare)
    spread = f"{pairs[0]:.3f}-{pairs[-1]:.3f}"
    return name, f"{statistics.median(ours):.3f} s", f"{statistics.median(bare):.3f} s", f"{ratio:.3f}", spread, goal


def pss(processes: list[psutil.Process]) -> int:
    """Return the processes' memory, with what several share counted once."""
    return sum(process.memory_full_info().pss for process in processes)


def machine() -> str:
    """Return a line that says what this was measured on."""
    import torch

    model = next(
        (ln.split(":")[1].strip() for ln in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in ln), ""
    )
    return (
        f"{len(os.sched_getaffinity(0))} cores ({model}), Python {platform.python_version()}, torch {torch.__version__}"
    )


def write(path: str, title: str, command: str, tables: list[Table]) -> None:
    """Write tables to a Markdown file, with the command that made them."""
    Path(path).write_text(f"# {title}\n\n`{command}` on {machine()}.\n\n" + "\n".join(map(str, tables)))
