"""How runs end: ``python benchmarks/stop.py [interrupt] [failure] [kill] [rounds]``.

Interrupts, failures and the death of the kernel, timed from outside, beside bare torchrun on the same code where it
can do the same; and rounds in which a random process of a run gets a random signal. ``--write FILE`` leaves the tables
as Markdown. Needs what the tests need.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from run import Torchrun, environment
from side_by_side import IMPORTS, Table, rounds_table, write

from tests import rounds
from tests.kernel import Kernel
from tests.leftovers import marked

RANKS = (2, 4, 8)

# Before what a rank waits in, on both sides.
READY = "open(FOLDER + f'/ready.{rank}', 'w').close()\n"

SLEEP = "time.sleep(600)"
LOADER = "for batch in torch.utils.data.DataLoader(range(1 << 30), num_workers=2): time.sleep(0.001)"
IGNORE_INT = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
IGNORE_TERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"

# What ranks do when they are interrupted: before they are ready, then; and whether they answer.
WAYS = (
    ("time.sleep", "", SLEEP, True),
    ("a Python loop", "", "while True: sum(range(1000))", True),
    ("all but rank 0 in a barrier", "", f"dist.barrier() if rank else {SLEEP}", True),
    ("a DataLoader with 2 workers", "", LOADER, True),
    ("a wait for a program", "import subprocess\n", "subprocess.call(['sleep', '600'])", True),
    ("SIGINT ignored", IGNORE_INT, SLEEP, False),
    ("SIGINT and SIGTERM ignored", IGNORE_INT + IGNORE_TERM, SLEEP, False),
)

# A rank notes the time and fails, a second after all are ready.
FAILING = """\
time.sleep(1)
with open(FOLDER + '/failed', 'w') as file:
    file.write(str(time.monotonic()))
"""
FAILURES = (
    ("raises, the others sleep", "raise ValueError('no data')", SLEEP),
    ("raises, the others in a barrier", "raise ValueError('no data')", "dist.barrier()"),
    ("killed by SIGKILL, the others sleep", "os.kill(os.getpid(), 9)", SLEEP),
)

# Bare torchrun kills after 30 seconds.
AT_MOST = 60.0


class Ready:
    """The folder in which ranks leave word."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "ready"

    def body(self, before: str, then: str) -> str:
        """Return code that says that it is ready in between."""
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            path.unlink()
        return (before + READY + then).replace("FOLDER", repr(str(self.folder)))

    def wait(self, ranks: int) -> None:
        """Wait until all ranks are ready, and a moment more: they are to be in what comes then."""
        if not rounds.wait_for(lambda: len(list(self.folder.glob("ready.*"))) == ranks, AT_MOST):
            raise RuntimeError("the ranks are not ready")
        time.sleep(0.3)

    def failed_at(self) -> float:
        """Return when the rank failed."""
        return float((self.folder / "failed").read_text())


@contextlib.contextmanager
def a_kernel() -> Iterator[Kernel]:
    """Start a kernel and close it."""
    kernel = rounds.new_kernel()
    try:
        yield kernel
    finally:
        kernel.close()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return those that are not gone; one that only its parent has not looked at is."""
    left = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left


@contextlib.contextmanager
def bare(torchrun: Torchrun, body: str, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start torchrun; in the end, kill what is left of it."""
    command = torchrun.command(body, ranks)
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(ranks),
        start_new_session=True,
    )
    root = psutil.Process(process.pid)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.Error):
            for one in [*root.children(recursive=True), root]:
                one.kill()
        process.wait()


def interrupt(torchrun: Torchrun, ready: Ready, repeat: int) -> list[Table]:
    """From an interrupt to the prompt."""
    table = Table(
        "From an interrupt to the prompt, in seconds",
        ("ranks are in", "ranks", "median", "worst", "goal", "processes left", "torchrun", "left", "ratio"),
    )
    with a_kernel() as kernel:
        for name, before, then, answers in WAYS:
            for ranks in RANKS:
                ours = [_interrupt(kernel, ready, before, then, ranks) for _ in range(repeat)]
                # Those that it has to kill take it half a minute.
                theirs = [_interrupt_bare(torchrun, ready, before, then, ranks) for _ in range(2 if answers else 1)]
                median = statistics.median(seconds for seconds, _ in ours)
                bare_median = statistics.median(seconds for seconds, _ in theirs)
                table.rows.append(
                    (
                        name,
                        str(ranks),
                        f"{median:.3f}",
                        f"{max(ours)[0]:.3f}",
                        "< 0.5" if answers else f"< {rounds.GRACE} + 1",
                        str(max(left for _, left in ours)),
                        f"{bare_median:.3f}",
                        str(max(left for _, left in theirs)),
                        f"{median / bare_median:.3f}",
                    )
                )
                print(*table.rows[-1], sep=" | ", flush=True)
    return [table]


def _interrupt(kernel: Kernel, ready: Ready, before: str, then: str, ranks: int) -> tuple[float, int]:
    """Return the seconds until the kernel was idle, and how many processes of the run were there then."""
    request = kernel.ask(f"%%ddp --cpus {ranks}\n{IMPORTS}" + ready.body(before, then))
    ready.wait(ranks)
    launcher = rounds.launcher_of(kernel)
    assert launcher is not None
    processes = launcher.children(recursive=True)
    began = time.monotonic()
    kernel.interrupt()
    request.wait(AT_MOST)
    left = len(alive(processes))
    assert request.returned_at is not None, "the cell does not end"
    return request.returned_at - began, left


def _interrupt_bare(torchrun: Torchrun, ready: Ready, before: str, then: str, ranks: int) -> tuple[float, int]:
    """Return the seconds until torchrun's process was gone, and how many of its descendants were there then."""
    with bare(torchrun, ready.body(before, then), ranks) as process:
        ready.wait(ranks)
        processes = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(AT_MOST)
        seconds = time.monotonic() - began
        left = alive(processes)
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        return seconds, len(left)


def failure(torchrun: Torchrun, ready: Ready, repeat: int) -> list[Table]:
    """From a rank's failure to its traceback in the notebook; with torchrun, to the end of its process."""
    table = Table(
        "From the failure of one rank to the error message in the notebook, in seconds",
        ("the last rank", "ranks", "median", "worst", "goal", "torchrun", "ratio"),
    )
    with a_kernel() as kernel:
        for name, fails, others in FAILURES:
            for ranks in RANKS:
                then = f"if rank == {ranks - 1}:\n{textwrap.indent(FAILING + fails, '    ')}\n{others}"
                ours = [_failure(kernel, ready, then, ranks) for _ in range(repeat)]
                theirs = [_failure_bare(torchrun, ready, then, ranks) for _ in range(2)]
                median, bare_median = statistics.median(ours), statistics.median(theirs)
                row = (
                    f"{median:.3f}",
                    f"{max(ours):.3f}",
                    "< 0.3",
                    f"{bare_median:.3f}",
                    f"{median / bare_median:.3f}",
                )
                table.rows.append((name, str(ranks), *row))
                print(*table.rows[-1], sep=" | ", flush=True)
    return [table]


def _failure(kernel: Kernel, ready: Ready, then: str, ranks: int) -> float:
    request = kernel.ask(f"%%ddp --cpus {ranks}\n{IMPORTS}" + ready.body("", then))
    request.wait(AT_MOST)
    assert request.failed_at is not None, "the cell does not fail"
    return request.failed_at - ready.failed_at()


def _failure_bare(torchrun: Torchrun, ready: Ready, then: str, ranks: int) -> float:
    with bare(torchrun, ready.body("", then), ranks) as process:
        process.wait(AT_MOST)
        return time.monotonic() - ready.failed_at()


def kill(folder: Path, repeat: int) -> list[Table]:
    """From the kernel's SIGKILL until nothing is left."""
    table = Table(
        "From the kernel's SIGKILL until none of its run's processes and files is left, in seconds",
        ("stage", "ranks", "median", "worst", "goal", "processes"),
    )
    stages = ("importing", "launching", "running", "collective", "results", "ending")
    for stage in stages:
        for ranks in (2, 8):
            turns = [_kill(folder, stage, ranks) for _ in range(repeat)]
            seconds = [turn[0] for turn in turns]
            row = (f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}", "< 2", str(max(n for _, n in turns)))
            table.rows.append((stage, str(ranks), *row))
            print(*table.rows[-1], sep=" | ", flush=True)
    return [table]


def _kill(folder: Path, stage: str, ranks: int) -> tuple[float, int]:
    """Return the seconds until nothing is left, and how many processes there were."""
    with a_kernel() as kernel:
        code = rounds.cell(stage, ranks, folder / "reached", IGNORE_TERM)
        if stage == "importing":
            kernel.ok("%reload_ext nbddp")
        kernel.ask(code)
        if stage in ("importing", "launching"):
            time.sleep(0.1)
        else:
            rounds.wait_until_reached(folder / "reached", ranks)
        processes = psutil.Process(kernel.pid).children(recursive=True)
        began = time.monotonic()
        kernel.kill()

        def gone() -> bool:
            own = f"nbddp-{kernel.pid}-"
            if alive(processes) or any(path.name.startswith(own) for path in folder.iterdir()):
                return False
            return not any(path.name.startswith(own) for path in Path("/dev/shm").iterdir()) and not alive(marked())

        if not rounds.wait_for(gone, AT_MOST):
            raise RuntimeError(f"left of a killed kernel: {alive(processes)} {alive(marked())}")
        return time.monotonic() - began, len(processes)


def play(folder: Path, seed: int, numbers: range, show: Callable[[object], None]) -> list[Table]:
    """Rounds in which a random process gets a random signal at a random moment."""
    series = rounds.series(folder)
    with contextlib.closing(series):
        return [rounds_table("Rounds", seed, numbers, lambda k: series.play(rounds.Plan.draw(seed, k)), show)]


def main() -> None:
    """Run the benchmarks that the command line names."""
    names = ("interrupt", "failure", "kill", "rounds")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[*names, []], default=[])
    parser.add_argument("--repeat", type=int, default=5, help="how many turns a figure of nbddp's is made of")
    parser.add_argument("--rounds", type=int, default=200, help="how many rounds")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="what the rounds are drawn from")
    parser.add_argument("--only", type=int, metavar="K", help="play round K alone")
    parser.add_argument("--write", metavar="FILE", help="leave the tables in a file, too")
    given = parser.parse_args()
    numbers = range(given.rounds) if given.only is None else range(given.only, given.only + 1)
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= rounds.private(folder)
        torchrun, ready = Torchrun(folder), Ready(folder)
        for which in given.which or names:
            match which:
                case "interrupt":
                    made = interrupt(torchrun, ready, given.repeat)
                case "failure":
                    made = failure(torchrun, ready, given.repeat)
                case "kill":
                    made = kill(folder, given.repeat)
                case _:
                    made = play(folder, given.seed, numbers, lambda line: print(line, flush=True))
            for table in made:
                print(table, flush=True)
            tables += made
    if given.write:
        command = " ".join(["python benchmarks/stop.py", *given.which])
        write(given.write, "How runs end", command, tables)


if __name__ == "__main__":
    main()
