"""What showing the ranks' output costs: ``python benchmarks/output.py [flood] [first] [panel] [many]``.

Ratios are of medians that were taken in turn, in the same run on the same machine. ``--write FILE`` leaves the tables
as Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import os
import random
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from run import Torchrun, environment
from side_by_side import Kernel, Table, kernel, ratio_row, write

from nbddp import _wire
from nbddp._log_files import Logs
from nbddp._loop import Loop
from nbddp._memory import Meter
from nbddp._panel import Panel
from nbddp._ranks import Ranks
from nbddp._relay import Relay

LINES = 100_000

# The seconds go to a file: they are not to be in the output that is compared. By line is what shows a script's output
# while it runs; into a file, Python writes 8 KB at once.
FLOOD = """
import sys
if {by_line}:
    sys.stdout.reconfigure(line_buffering=True)
dist.barrier()
if rank == 0:
    began = time.perf_counter()
    for i in range({lines}):
        print(f'step {{i:6}} loss {{1 / (i + 1):.6f}}')
    sys.stdout.flush()
    seconds = time.perf_counter() - began
    with open({path!r}, 'w') as file:
        file.write(str(seconds))
dist.barrier()
"""

# The time of each print goes with it. Off the beat of whatever is done every so often on the other side.
STAMPS = """
import random, time
for _ in range({count}):
    time.sleep(0.5 + random.random() / 2)
    print('printed at', time.time(), flush={flush})
time.sleep(0.5)  # at the end of a cell the kernel flushes what it has
"""
STAMP = "printed at "

STEPS = """
torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = torch.randn(512, 1, 16, 16), torch.randint(10, (512,))
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
    torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
    torch.nn.Flatten(), torch.nn.Linear(256, 10),
)
optimizer = torch.optim.Adam(model.parameters())
steps = 0
while True:
    if steps == 50:  # the first ones import, allocate and warm caches
        began, used = time.perf_counter(), time.process_time()
    batch = torch.arange(steps * 64, steps * 64 + 64) % 512
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    steps += 1
    if steps % 50 == 0:
        print(f'step {{steps}} loss {{loss.item():.4f}}')
        if steps > 50 and time.perf_counter() - began > {seconds}:
            break
print('RESULT', (time.perf_counter() - began) / (steps - 50), (time.process_time() - used) / (steps - 50))
"""


def flood(torchrun: Torchrun, folder: Path, repeat: int) -> list[Table]:
    """100,000 lines of one rank, beside the same into a file."""
    head = ("", "nbddp", "torchrun", "ratio", "pairs", "goal")
    inside = Table(f"{LINES:,} lines of rank 0, seconds in the rank from the first print to the last flush", head)
    whole = Table("The same from the request to idle, beside all of torchrun", head)
    check = Table("What became of the lines", ("", "complete log", "shown"))
    expected = "".join(f"step {i:6} loss {1 / (i + 1):.6f}\n" for i in range(LINES))
    path, file = folder / "seconds", folder / "output"

    def body(by_line: bool) -> str:
        return FLOOD.format(lines=LINES, path=str(path), by_line=by_line)

    with kernel() as notebook:
        notebook.warm_up()
        notebook.run("import nbddp")
        for ranks in (1, 2):
            ours: list[tuple[float, float]] = []
            bare: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            for _ in range(repeat):
                # Three cells for one torchrun: their medians.
                cells = []
                for _ in range(3):
                    time.sleep(2)  # a server takes so much a second, and the cell before has had its share
                    taken, text = notebook.run(f"%%ddp --cpus {ranks}\n{body(False)}")
                    cells.append((float(path.read_text()), taken))
                ours.append((statistics.median(c[0] for c in cells), statistics.median(c[1] for c in cells)))
                for by_line, times in bare.items():
                    command = torchrun.command(body(by_line), ranks)
                    began = time.perf_counter()
                    with file.open("w") as into:
                        subprocess.run(
                            command, stdout=into, stderr=subprocess.DEVNULL, env=environment(ranks), check=True
                        )
                    times.append((float(path.read_text()), time.perf_counter() - began))
                    if file.read_text() != expected:
                        raise RuntimeError("torchrun's file is not what was printed")
            log = Path(notebook.run("print(nbddp._function.client.session.logs)")[1].strip()) / "rank0.log"
            same = log.read_bytes() == expected.encode()
            shown = text.splitlines()
            ends = f"step {0:6} " in shown[0] and f"step {LINES - 1:6} " in shown[-1]
            said = any(f"of rank 0 not shown; %ddp log --rank {0}" in line for line in shown)
            name = "1 rank" if ranks == 1 else f"{ranks} ranks"
            what = ["first and last line" if ends else "ENDS MISSING", "what is left out" if said else "NOTHING SAID"]
            what.append(f"{len(text):,} of {len(expected):,} characters")
            check.rows.append((name, "equal to the last byte" if same else "DIFFERENT", ", ".join(what)))
            for by_line, times in bare.items():
                title = f"{name}, {'by line' if by_line else 'by 8 KB, as Python does'} > file"
                goal = "" if by_line else "<= 1.2"
                inside.rows.append(ratio_row(title, [t[0] for t in ours], [t[0] for t in times], goal))
            whole.rows.append(ratio_row(name, [t[1] for t in ours], [t[1] for t in bare[False]], ""))
    return [inside, whole, check]


def first() -> list[Table]:
    """How long a line is on its way from a rank's print to a client of the kernel."""
    table = Table("From print to the client, in seconds", ("line", "median", "worst", "how many", "goal of the worst"))
    with kernel() as notebook:
        notebook.warm_up()
        for name, cell, cells, lines, goal in (
            ("first of a cell, 1 rank", "%%ddp --cpus 1\n" + STAMPS, 15, 1, "<= 0.3"),
            ("first of a cell, 2 ranks", "%%ddp --cpus 2\n" + STAMPS, 8, 2, "<= 0.3"),
            ("one now and then, 1 rank, beside the panel", "%%ddp --cpus 1\n" + STAMPS, 1, 15, "<= 0.3"),
            ("one now and then, 1 rank, --plain", "%%ddp --cpus 1 --plain\n" + STAMPS, 1, 15, ""),
            ("the kernel's own, in an ordinary cell", STAMPS, 1, 15, ""),
            ("the same, flushed", STAMPS, 1, 15, ""),
        ):
            late: list[float] = []

            def look(text: str, late: list[float] = late) -> None:
                now = time.time()
                late += [now - float(line.rpartition(STAMP)[2]) for line in text.splitlines() if STAMP in line]

            count = 1 if cells > 1 else lines
            for _ in range(cells):
                notebook.run(cell.format(count=count, flush="flushed" in name), look)
            table.rows.append((name, f"{statistics.median(late):.3f}", f"{max(late):.3f}", str(len(late)), goal))
    return [table]


def beside_panel(repeat: int, seconds: float) -> list[Table]:
    """The steps of a training loop beside a panel and without one."""
    head = ("a step", "one", "other", "ratio", "pairs", "goal")
    table = Table(f"Training on 1 rank for {seconds:.0f} s, with the panel beside --plain", head)
    # What scatter alone does: the same twice.
    sides = ("", " --plain", " --plain")
    clock: list[list[float]] = [[] for _ in sides]
    cpu: list[list[float]] = [[] for _ in sides]
    with kernel() as notebook:
        notebook.warm_up()
        for turn in range(repeat):
            order = list(range(len(sides)))
            # Each is first, second and last in turn.
            for side in order[turn % 3 :] + order[: turn % 3]:
                one, other = _step(notebook, sides[side], seconds)
                clock[side].append(one)
                cpu[side].append(other)
    for name, times in (("by the clock", clock), ("processor time of the rank", cpu)):
        for a, b, what, goal in ((0, 2, "panel beside --plain", "<= 1.01"), (1, 2, "--plain beside itself", "")):
            table.rows.append(_step_row(f"{what}, {name}", times[a], times[b], goal))
    return [table]


def _step(notebook: Kernel, options: str, seconds: float) -> tuple[float, float]:
    _, text = notebook.run(f"%%ddp --cpus 1{options}\n{STEPS.format(seconds=seconds)}")
    result = next(line for line in text.splitlines() if line.startswith("RESULT")).split()
    return float(result[1]), float(result[2])


def _step_row(name: str, ours: list[float], bare: list[float], goal: str) -> tuple[str, ...]:
    pairs = sorted(a / b for a, b in zip(ours, bare, strict=True))
    medians = [f"{statistics.median(times) * 1e3:.3f} ms" for times in (ours, bare)]
    return name, *medians, f"{statistics.median(pairs):.3f}", f"{pairs[0]:.3f}-{pairs[-1]:.3f}", goal


class Counter:
    """A screen that counts."""

    in_place = True

    def __init__(self) -> None:
        self.text = self.html = 0
        self.panels: list[float] = []

    def write(self, text: str) -> None:
        """Count characters."""
        self.text += len(text)

    def publish(self, data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, Any], update: bool) -> None:
        """Do nothing: these ranks display nothing."""

    def panel(self, data: dict[str, Any]) -> None:
        """Take note of when it was."""
        self.panels.append(time.monotonic())
        self.html += sum(map(len, data.values()))

    def clear(self, *, wait: bool) -> None:
        """Do nothing: these ranks clear nothing."""

    def room(self) -> int:
        """Return how much text may come: any."""
        return 1 << 40


class Pretended:
    """A rank without a process: the ends of its pipe and of its socket."""

    def __init__(self, rank: int, world: int, path: str, secret: str) -> None:
        self.rank = rank
        self.steps = 0
        self._marks = _wire.mark(secret, "e"), _wire.mark(secret, "o")
        self._sock = _wire.connect(path)
        # Questions are not read; they do not fill it in the time that this takes.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        out, self._into = os.pipe()
        _wire.send(self._sock, "rank", fds=[out], rank=rank, local=rank, world=world, pid=os.getpid(), attempt=0)
        os.close(out)
        _wire.send(self._sock, "begin")

    def print(self) -> None:
        """Print a line."""
        self.steps += 1
        os.write(self._into, f"epoch 1 step {self.steps} loss {1 / self.steps:.5f}\n".encode())

    def draw(self) -> None:
        """Draw a bar anew, on stderr, as tqdm does."""
        done = self.steps % 100
        bar = f"\rtraining: {done:3}%|{'█' * (done // 10):10}| {done}/100 [00:{done // 10:02}<00:10, 10.00it/s]"
        before, after = self._marks
        os.write(self._into, before + bar.encode() + after)

    def answer(self) -> None:
        """Tell where it is, as a rank does when it is asked."""
        _wire.send(self._sock, "at", waits=None, line=7)

    def close(self) -> None:
        """Be gone."""
        self._sock.close()
        os.close(self._into)


def many(seconds: float) -> list[Table]:
    """Many ranks that print and draw, all but their processes: sockets, pipes, loop, relay, panel."""
    table = Table(
        "Ranks of which each prints 10 lines a second and draws a bar 10 times a second",
        ("", "panel updates a second", "goal", "of one core", "goal", "kB of text a second", "kB a panel update"),
    )
    for count, goals in ((8, ("", "")), (64, (">= 2", "< 0.10"))):
        runs = [simulate(count, seconds) for _ in range(3)]
        screen = runs[-1][0]
        shares = sorted(used / seconds for _, used in runs)
        between = screen.panels[-1] - screen.panels[0]
        table.rows.append(
            (
                f"{count} ranks",
                f"{(len(screen.panels) - 1) / between:.3f}",
                goals[0],
                f"{shares[1]:.3f} ({shares[0]:.3f}-{shares[2]:.3f})",
                goals[1],
                f"{screen.text / seconds / 1e3:.0f}",
                f"{screen.html / len(screen.panels) / 1e3:.1f}",
            )
        )
    return [table]


def simulate(count: int, seconds: float) -> tuple[Counter, float]:
    """Return the screen and the processor seconds that were used, but for those of the pretended ranks."""
    secret, screen, loop = "0123456789abcdef", Counter(), Loop()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = os.path.join(folder, "socket")
        server = stack.enter_context(_wire.listen(path))
        relay = Relay(count, Logs(folder), secret, screen)
        stack.callback(relay.close)
        ranks = Ranks(server, loop)
        ranks.attach(relay)
        stack.callback(loop.close)
        stack.callback(ranks.close)
        panel = Panel(ranks, count, relay.outputs, screen, Meter())
        pretended = []
        for rank in range(count):
            pretended.append(Pretended(rank, count, path, secret))
            stack.callback(pretended[-1].close)
            while len(ranks.states) <= rank:
                loop.step(time.monotonic() + 1)
        panel.begin()
        # Each at its own time, which is the worst case: nothing comes together.
        ways = [(one.print, 0.1) for one in pretended] + [(one.draw, 0.1) for one in pretended]
        ways += [(one.answer, 1.0) for one in pretended]
        began = time.monotonic()
        chance = random.Random(0)
        events = [(began + chance.random() * every, number) for number, (_, every) in enumerate(ways)]
        heapq.heapify(events)
        used, theirs = time.process_time(), 0.0
        while (now := time.monotonic()) < began + seconds:
            # As `nbddp._run.Run.wait` does.
            loop.step(min(events[0][0], ranks.due, relay.due, panel.due))
            if time.monotonic() >= relay.due:
                relay.tick()
            ranks.tick()
            panel.tick()
            now = time.monotonic()
            before = time.thread_time()
            while events[0][0] <= now:
                at, number = events[0]
                act, every = ways[number]
                act()
                heapq.heapreplace(events, (at + every, number))
            theirs += time.thread_time() - before
        return screen, time.process_time() - used - theirs


def main() -> None:
    """Run the benchmarks that the command line names."""
    names = ("flood", "first", "panel", "many")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[*names, []], default=[])
    parser.add_argument("--repeat", type=int, default=6, help="how many pairs of runs a ratio is made of")
    parser.add_argument("--write", metavar="FILE", help="leave the tables in a file, too")
    given = parser.parse_args()
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for which in given.which or names:
            match which:
                case "flood":
                    made = flood(Torchrun(folder), folder, given.repeat)
                case "first":
                    made = first()
                case "panel":
                    made = beside_panel(given.repeat, 8)
                case _:
                    made = many(8)
            for table in made:
                print(table, flush=True)
            tables += made
    if given.write:
        command = " ".join(["python benchmarks/output.py", *given.which])
        write(given.write, "What showing the ranks' output costs", command, tables)


if __name__ == "__main__":
    main()
