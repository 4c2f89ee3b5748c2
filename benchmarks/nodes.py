"""Ranks on nodes: ``python benchmarks/nodes.py [first] [flood] [stop] [data] [kept] [many] [rounds]``.

On a real Slurm of two nodes (four for the flood) and over a real sshd, both of this machine, beside what the same costs
by ``srun`` alone. Needs what the tests need, and what ``make cluster`` installs. ``--write FILE`` leaves the tables as
Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from output import simulate
from side_by_side import Table, ratio_row, rounds_table, write

from tests import node_rounds, rounds
from tests.cluster import Slurm, Sshd, free_ports
from tests.kernel import Kernel, Reply

LINES = 100_000
SECONDS = 300.0

# What bare torchrun runs, and what the cell does.
BODY = "t = torch.ones(1)\ndist.all_reduce(t)\nprint('first', int(t), flush=True)\n"
SLEEP = "print('begun', flush=True)\ntime.sleep(600)\n"
BARE = """\
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
{body}
dist.destroy_process_group()
"""

IMPORTS = "import time, torch, torch.distributed as dist\n"


@contextlib.contextmanager
def on_slurm(folder: Path, nodes: int) -> Iterator[tuple[Slurm, Kernel]]:
    """Start a Slurm, and a kernel that reaches it."""
    slurm = Slurm(Path(tempfile.mkdtemp(dir=folder)), nodes=nodes)
    try:
        kernel = Kernel(env=slurm.env)
        try:
            kernel.ok("%load_ext nbddp\n" + IMPORTS)
            yield slurm, kernel
        finally:
            kernel.close()
    finally:
        slurm.close()


class Srun:
    """The same by hand: ``srun torchrun``, and ``srun`` alone."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self._env = {key: value for key, value in {**os.environ, **slurm.env}.items() if value is not None}
        self._env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_LOG_LEVEL": "ERROR"}
        self._folder = folder

    def torchrun(self, body: str) -> subprocess.Popen[str]:
        """Start two nodes of two ranks, as torchrun's documentation has it for Slurm."""
        script = self._folder / "bare.py"
        script.write_text(BARE.format(body=body))
        agent = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        agent += [f"--rdzv-endpoint=127.0.0.1:{free_ports(1)[0]}", "--rdzv-id=bench", f"--log-dir={self._folder}/logs"]
        # Both nodes are this machine; each would take itself for the one that the endpoint means, and wait for ever.
        words = shlex.join([sys.executable, "-u", *agent])
        words += " --rdzv-conf=is_host=$((SLURM_PROCID == 0)) " + shlex.quote(str(script))
        return self.start(2, "sh", "-c", f"exec {words}")

    def start(self, nodes: int, *command: str, cpus: int = 2) -> subprocess.Popen[str]:
        """Start a command, once on each node."""
        options = [f"-N{nodes}", f"-n{nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"]
        return subprocess.Popen(
            ["srun", *options, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self._env,
            start_new_session=True,
        )


def until(process: subprocess.Popen[str], words: str, count: int) -> None:
    """Read what a process prints until so many lines hold these words."""
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        # Unbuffered, two ranks may get their words into one line.
        seen += line.count(words)
        if seen >= count:
            return
    raise RuntimeError(f"{words!r} did not come {count} times")


def first(folder: Path, repeat: int) -> list[Table]:
    """From the request to the first line of all four ranks."""
    table = Table(
        "From the request to the last rank's first line: two nodes of two ranks, an all-reduce and a print",
        ("what", "nbddp", "srun torchrun", "ratio", "pairs", "goal"),
    )
    with on_slurm(folder, 2) as (slurm, kernel):
        bare, ours, theirs = Srun(slurm, folder), [], []
        for turn in range(repeat + 1):
            ours.append(_first_lines(kernel))
            began = time.perf_counter()
            process = bare.torchrun(BODY)
            until(process, "first 4", 4)
            theirs.append(time.perf_counter() - began)
            process.communicate()
            if turn == 0:  # what is read from disk for the first time
                ours.clear()
                theirs.clear()
        table.rows.append(ratio_row("a fresh cell under Slurm", ours, theirs, "<= 1.1"))
    return [table]


def _first_lines(kernel: Kernel) -> float:
    began = time.perf_counter()
    request = kernel.ask("%%ddp --nnodes 2 --cpus 2\n" + BODY)
    request.follow(lambda reply: reply.text.count("first 4") == 4, SECONDS)
    took = time.perf_counter() - began
    if not request.wait(SECONDS) or request.reply.error:
        raise RuntimeError(request.reply.traceback)
    return took


def flood(folder: Path, repeat: int) -> list[Table]:
    """100,000 lines from each of four nodes."""
    table = Table(
        f"{LINES:,} lines from one rank on each of four nodes, until all have arrived",
        ("what", "nbddp", "srun", "ratio", "pairs", "goal"),
    )
    whole = Table("... and how many lines arrived whole", ("what", "of", "whole"))
    script = folder / "print.py"
    script.write_text(f"import os\nfor i in range({LINES}): print('line', i, 'of', os.environ['SLURM_PROCID'])\n")
    with on_slurm(folder, 4) as (slurm, kernel):
        bare, ours, theirs = Srun(slurm, folder), [], []
        kernel.ok("%%ddp --nnodes 4 --cpus 1 --keep\npass", timeout=SECONDS)
        for _ in range(repeat):
            cell = f"%%ddp --keep\nfor i in range({LINES}): print('line', i, 'of', rank)"
            began = time.perf_counter()
            reply = kernel.ok(cell, timeout=SECONDS)
            ours.append(time.perf_counter() - began)
            began = time.perf_counter()
            # An interpreter takes a moment to start; the ranks that stay have done so.
            text = bare.start(4, sys.executable, "-S", str(script), cpus=1).communicate()[0]
            theirs.append(time.perf_counter() - began)
        table.rows.append(ratio_row("through the relay, into the logs and the cell", ours, theirs, "as fast"))
        logs = _log_folder(kernel.ok("%ddp log"))
        good = sum(_whole((logs / f"rank{rank}.log").read_text(), rank) for rank in range(4))
        whole.rows.append(("nbddp", f"{4 * LINES:,}", f"{good:,}"))
        found = set(re.findall(r"^line \d+ of \d$", text, re.M))
        whole.rows.append(("srun", f"{4 * LINES:,}", f"{len(found):,}"))
        assert "lines" in reply.text
        kernel.ok("%ddp stop")
    return [table, whole]


def _log_folder(reply: Reply) -> Path:
    path = next(Path(word) for word in reply.text.split() if "logs-" in word)
    return path if path.is_dir() else path.parent


def _whole(text: str, rank: int) -> int:
    return sum(line == f"line {i} of {rank}" for i, line in enumerate(text.splitlines()))


def stop(folder: Path, repeat: int) -> list[Table]:
    """From an interrupt to the prompt; from the kernel's death until nothing is left."""
    table = Table(
        "Two nodes of two ranks, in seconds",
        ("what", "median", "worst", "beside", "median"),
    )
    with on_slurm(folder, 2) as (slurm, kernel):
        bare, ours, theirs = Srun(slurm, folder), [], []
        for _ in range(repeat):
            request = kernel.ask("%%ddp --nnodes 2 --cpus 2\n" + SLEEP)
            request.follow(lambda reply: reply.text.count("begun") == 4, SECONDS)
            began = time.perf_counter()
            kernel.interrupt()
            if not request.wait(60):
                raise RuntimeError("no prompt")
            ours.append(time.perf_counter() - began)
            process = bare.torchrun(SLEEP)
            until(process, "begun", 4)
            began = time.perf_counter()
            slurm.run("scancel", *(job["id"] for job in slurm.squeue()))
            process.communicate()
            theirs.append(time.perf_counter() - began)
        row = (f"{statistics.median(ours):.3f}", f"{max(ours):.3f}", "scancel until srun is gone")
        table.rows.append(("an interrupt, until the prompt, Slurm", *row, f"{statistics.median(theirs):.3f}"))
    for name, many in (("Slurm", _slurm_kernel), ("ssh", _ssh_kernel)):
        gone = [many(folder) for _ in range(repeat)]
        table.rows.append(
            (
                f"SIGKILL of the kernel, until nothing is left, {name}",
                f"{statistics.median(gone):.3f}",
                f"{max(gone):.3f}",
                "",
                "",
            )
        )
    return [table]


def _slurm_kernel(folder: Path) -> float:
    with on_slurm(folder, 2) as (slurm, kernel):
        return _killed(kernel, "--nnodes 2", lambda: not slurm.squeue())


def _ssh_kernel(folder: Path) -> float:
    sshd = Sshd(Path(tempfile.mkdtemp(dir=folder)))
    try:
        kernel = Kernel(env=sshd.env)
        try:
            kernel.ok("%load_ext nbddp\n" + IMPORTS)
            return _killed(kernel, "--hosts a,b", lambda: not (sshd.sessions("a") or sshd.sessions("b")))
        finally:
            kernel.close()
    finally:
        sshd.close()


def _killed(kernel: Kernel, options: str, engine_is_clear: Callable[[], bool]) -> float:
    from stop import alive

    from tests.leftovers import marked

    request = kernel.ask(f"%%ddp {options} --cpus 2\n{SLEEP}")
    request.follow(lambda reply: reply.text.count("begun") == 4, SECONDS)
    began = time.perf_counter()
    kernel.kill()
    if not rounds.wait_for(lambda: not alive(marked()) and engine_is_clear(), 30):
        raise RuntimeError(f"left: {alive(marked())}")
    return time.perf_counter() - began


def data(folder: Path, repeat: int) -> list[Table]:
    """A gigabyte to two nodes, and back."""
    table = Table(
        "1 GiB of captured tensors to two nodes of one rank each, which stay",
        ("over", "to the nodes", "back from rank 0", "the engine alone", "ratio"),
    )
    with on_slurm(folder, 2) as (slurm, kernel):
        bare = Srun(slurm, folder)
        table.rows.append(_data_row("Slurm", kernel, "--nnodes 2", lambda: _srun_stdin(bare), repeat))
    sshd = Sshd(Path(tempfile.mkdtemp(dir=folder)))
    try:
        kernel = Kernel(env=sshd.env)
        kernel.ok("%load_ext nbddp\n" + IMPORTS)
        table.rows.append(_data_row("ssh", kernel, "--hosts a,b", lambda: _ssh_stdin(sshd), repeat))
        kernel.close()
    finally:
        sshd.close()
    return [table]


def _data_row(name: str, kernel: Kernel, options: str, alone: Callable[[], float], repeat: int) -> tuple[str, ...]:
    there, back, bare = [], [], []
    kernel.ok(f"%%ddp {options} --cpus 1 --keep\npass", timeout=SECONDS)
    for _ in range(repeat):
        kernel.ok("big = torch.rand(1 << 28)")
        began = time.perf_counter()
        kernel.ok("%ddp push big", timeout=SECONDS)
        there.append(time.perf_counter() - began)
        began = time.perf_counter()
        kernel.ok("%ddp pull big", timeout=SECONDS)
        back.append(time.perf_counter() - began)
        bare.append(alone())
    kernel.ok("%ddp stop")
    ratio = statistics.median(there) / statistics.median(bare)
    return name, *(f"{statistics.median(x):.1f} s" for x in (there, back, bare)), f"{ratio:.2f}"


def _feed(processes: list[subprocess.Popen[bytes]]) -> float:
    piece = os.urandom(1 << 20)
    began = time.perf_counter()
    for _ in range(1 << 10):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(piece)
    for process in processes:
        process.communicate()
    return time.perf_counter() - began


def _srun_stdin(bare: Srun) -> float:
    command = ["srun", "-N2", "-n2", "sh", "-c", "cat > /dev/null"]
    return _feed([subprocess.Popen(command, stdin=subprocess.PIPE, env=bare._env)])


def _ssh_stdin(sshd: Sshd) -> float:
    return _feed(
        [subprocess.Popen(sshd.command(host, "cat > /dev/null"), stdin=subprocess.PIPE) for host in ("a", "b")]
    )


def kept(folder: Path, repeat: int) -> list[Table]:
    """A cell on ranks that stay, on nodes and on this machine."""
    table = Table(
        "A kept cell of four ranks: all-reduce and print, until the prompt",
        ("what", "on nodes", "on this machine", "ratio", "pairs", "goal"),
    )
    with on_slurm(folder, 2) as (_, far):
        near = Kernel()
        try:
            near.ok("%load_ext nbddp\n" + IMPORTS)
            far.ok("%%ddp --nnodes 2 --cpus 2 --keep\npass", timeout=SECONDS)
            near.ok("%%ddp --cpus 4 --keep\npass", timeout=SECONDS)
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(repeat * 10):
                for kernel, into in ((far, ours), (near, theirs)):
                    began = time.perf_counter()
                    kernel.ok("%%ddp --keep\n" + BODY)
                    into.append(time.perf_counter() - began)
            table.rows.append(ratio_row("Slurm, two nodes", ours, theirs, "-"))
            far.ok("%ddp stop")
            near.ok("%ddp stop")
        finally:
            near.close()
    return [table]


def many(seconds: float) -> list[Table]:
    """What grows with the number of ranks in the kernel: 64 nodes of 8, pretended."""
    table = Table(
        "Ranks that print a line and draw a bar ten times a second, pretended: the relay and the panel in the kernel",
        ("ranks", "cores", "panels a second", "bytes of HTML each"),
    )
    for count in (8, 64, 512):
        screen, used = simulate(count, seconds)
        between = screen.panels[-1] - screen.panels[0]
        rate = (len(screen.panels) - 1) / between if between else 0.0
        table.rows.append(
            (str(count), f"{used / seconds:.3f}", f"{rate:.1f}", f"{screen.html / len(screen.panels):,.0f}")
        )
    return [table]


def play(folder: Path, seed: int, numbers: range) -> list[Table]:
    """Rounds in which a random process, from the kernel to a rank, gets a random signal at a random moment."""
    slurm = Slurm(Path(tempfile.mkdtemp(dir=folder)), nodes=2)
    series = node_rounds.series(folder, slurm)
    with contextlib.closing(slurm), contextlib.closing(series):
        draw = functools.partial(node_rounds.Plan.draw, seed)
        show = functools.partial(print, flush=True)
        return [rounds_table("Rounds on Slurm", seed, numbers, lambda k: series.play(draw(k)), show)]


def main() -> None:
    """Run the benchmarks that the command line names."""
    parts: dict[str, Callable[[Path, int], list[Table]]] = {
        "first": first,
        "flood": flood,
        "stop": stop,
        "data": data,
        "kept": kept,
        "many": lambda _, __: many(8.0),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[*parts, "rounds", []], default=[])
    parser.add_argument("--repeat", type=int, default=5, help="how many turns a figure is made of")
    parser.add_argument("--rounds", type=int, default=60, help="how many rounds")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="what the rounds are drawn from")
    parser.add_argument("--only", type=int, metavar="K", help="play round K alone")
    parser.add_argument("--write", metavar="FILE", help="leave the tables in a file, too")
    given = parser.parse_args()
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= rounds.private(folder)
        for which in given.which or parts:
            numbers = range(given.rounds) if given.only is None else range(given.only, given.only + 1)
            made = play(folder, given.seed, numbers) if which == "rounds" else parts[which](folder, given.repeat)
            for table in made:
                print(table, flush=True)
            tables += made
    if given.write:
        command = " ".join(["python benchmarks/nodes.py", *given.which])
        write(given.write, "Ranks on nodes", command, tables)


if __name__ == "__main__":
    main()
