"""Data to the ranks and back: ``python benchmarks/data.py [travel] [back] [memory] [small] [peers]``.

Times are those of a cell with the data less those of the same cell without, beside ``tensor.clone()`` of as many bytes
in the notebook; both are taken in turn. ``peers`` needs ``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from side_by_side import Kernel, Table, kernel, pss, write

GIB = "1 << 28"  # float32

NOTEBOOK = f"""
import time, numpy as np, pandas as pd
def timed(function):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began
tensor = torch.ones({GIB})
array = np.ones({GIB}, np.float32)
frame = pd.DataFrame(np.ones((1 << 22, 64), np.float32))
small = [{{'id': i, 'name': str(i), 'xy': (i, i + 1)}} for i in range(10_000)]
"""

CLASSES = """
for i in range(500):
    exec(f'''class C{i}:
    "One of many."
    def __init__(self, x=0): self.x = x
    def method(self, y): return self.x + y + {i}
''')
classes = [globals()[f'C{i}'] for i in range(500)]
"""

# Both sides of the comparison, in the notebook's own process; what is captured is also written, as for a run.
SMALL = """
import cloudpickle, statistics, os, tempfile
from nbddp._closure import capture
def ours(value):
    path = tempfile.mktemp()
    capture({'value': value}, globals(), {}).write(path)
    os.unlink(path)
def pairs(value, count=15):
    return [(timed(lambda: ours(value)), timed(lambda: cloudpickle.dumps(value))) for _ in range(count)]
"""


def copy(one: Kernel) -> float:
    """Return the seconds that a copy of 1 GiB takes in the notebook."""
    return float(one.run("print(timed(tensor.clone))")[1])


def row(name: str, ours: list[float], copied: list[float], goal: str) -> tuple[str, ...]:
    """Return a table's row: medians and their ratio."""
    a, b = statistics.median(ours), statistics.median(copied)
    return name, f"{a:.2f} s", f"{b:.2f} s", f"{a / b:.2f}", goal


HEAD = ("what", "nbddp", "tensor.clone()", "ratio", "goal")


def travel(one: Kernel, repeat: int) -> list[Table]:
    """1 GiB to one rank and to eight."""
    table = Table("1 GiB to a rank, beside a copy of as much in the notebook", HEAD)
    eight = Table("The same to 8 ranks, beside 1", ("what", "8 ranks", "1 rank", "ratio", "goal"))
    for name, needs in (("tensor", "torch"), ("array", "numpy"), ("frame", "pandas")):
        ours: dict[int, list[float]] = {1: [], 8: []}
        copied = []
        for _ in range(repeat):
            copied.append(copy(one))
            for ranks, times in ours.items():
                without = one.run(f"%%ddp --cpus {ranks}\nimport {needs}")[0]
                times.append(one.run(f"%%ddp --cpus {ranks}\nimport {needs}\n{name};")[0] - without)
        table.rows.append(row(f"{name}, 1 rank", ours[1], copied, "<= 2"))
        # In absolute terms: what seven ranks more cost, of the time for one.
        a, b = statistics.median(ours[8]), statistics.median(ours[1])
        eight.rows.append((name, f"{a:.2f} s", f"{b:.2f} s", f"{a / b:.2f}", "<= 1.05"))
    return [table, eight]


def back(one: Kernel, repeat: int) -> list[Table]:
    """1 GiB from rank 0."""
    table = Table("1 GiB back from rank 0, beside a copy of as much in the notebook", HEAD)
    for name, make in (
        ("tensor", f"import torch\nresult = torch.ones({GIB})"),
        ("array", f"import numpy\nresult = numpy.ones({GIB}, numpy.float32)"),
    ):
        ours, copied = [], []
        for _ in range(repeat):
            copied.append(copy(one))
            without = one.run(f"%%ddp --cpus 1\n{make}")[0]
            ours.append(one.run(f"%%ddp --cpus 1 --out result\n{make}")[0] - without)
            one.run("del result")
        table.rows.append(row(name, ours, copied, "<= 2"))
    return [table]


def memory(one: Kernel, folder: Path) -> list[Table]:
    """What the machine's memory grows by when eight ranks have read 1 GiB."""
    table = Table("Memory of 8 ranks that have read 1 GiB (PSS of the whole tree)", ("", "MB", "of 1 GiB", "goal"))
    found: list[int] = []
    for value in ("None", "tensor.sum()"):
        stop = folder / f"stop{len(found)}"

        def look(text: str, stop: Path = stop) -> None:
            look.seen += text.count("idle")  # type: ignore[attr-defined]
            if look.seen == 8:  # type: ignore[attr-defined]
                tree = [psutil.Process(one.pid), *psutil.Process(one.pid).children(recursive=True)]
                found.append(pss(tree))
                stop.touch()

        look.seen = 0  # type: ignore[attr-defined]
        one.run(
            f"%%ddp --cpus 8\nimport os, time\n{value}\nprint('idle', flush=True)\n"
            f"while not os.path.exists({str(stop)!r}): time.sleep(0.05)",
            look,
        )
    growth = found[1] - found[0]
    table.rows.append(("growth", f"{growth / 1e6:.0f}", f"{growth / 2**30:.3f}", "<= 1.05"))
    return [table]


def small(one: Kernel) -> list[Table]:
    """Many small objects, and many classes, beside cloudpickle alone."""
    table = Table("Small things, beside cloudpickle.dumps", ("what", "nbddp", "cloudpickle", "ratio", "goal"))
    one.run(SMALL + CLASSES)
    for name, value in (("10,000 dicts", "small"), ("500 classes", "classes")):
        pairs = ast.literal_eval(one.run(f"print(pairs({value}))")[1])
        ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        table.rows.append((name, f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms", f"{ours / theirs:.2f}", "<= 1.5"))
    return [table]


PEERS = """
import logging, sys, time, warnings, torch
warnings.simplefilter('ignore')
logging.disable(logging.CRITICAL)
def work(x):
    return x[-1].item()
def spawned(rank, x):
    work(x)
def with_nbddp(x):
    import nbddp
    nbddp.launch(work, x, cpus=2)
def with_torchrunx(x):
    import torchrunx
    torchrunx.Launcher(hostnames=['localhost'], workers_per_host=2, backend=None).run(work, x)
def with_spawn(x):
    import torch.multiprocessing as mp
    mp.spawn(spawned, (x,), nprocs=2)
if __name__ == '__main__':
    call = globals()['with_' + sys.argv[1]]
    x = torch.ones(int(sys.argv[2]) << 18)
    for _ in range(3):
        began = time.perf_counter()
        call(x)
        print('RESULT', time.perf_counter() - began, flush=True)
"""


def peers(folder: Path) -> list[Table]:
    """The same function with the same argument, from a script, by each."""
    script = folder / "peers.py"
    script.write_text(PEERS)
    table = Table(
        "A function of a tensor on 2 ranks, from a script",
        ("", "first call", "next, 1 MB", "next, 256 MB", "ratio to nbddp, 1 MB", "256 MB"),
    )
    times: dict[str, list[float]] = {}
    for peer in ("nbddp", "torchrunx", "spawn"):
        times[peer] = []
        for megabytes in (1, 256):
            run = subprocess.run(
                [sys.executable, str(script), peer, str(megabytes)],
                capture_output=True,
                text=True,
                check=False,
                cwd=folder,
            )
            found = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("RESULT")]
            if len(found) != 3:
                print(f"{peer} failed:\n{run.stderr[-1500:]}", file=sys.stderr)
                found = [float("nan")] * 3
            times[peer] += [found[0], min(found[1:])]
    for peer, (first, small_next, _, large_next) in times.items():
        name = {"torchrunx": "torchrunx Launcher.run", "spawn": "torch.multiprocessing.spawn", "nbddp": "nbddp.launch"}[
            peer
        ]
        ratios = [f"{a / b:.1f}" for a, b in ((small_next, times["nbddp"][1]), (large_next, times["nbddp"][3]))]
        table.rows.append((name, f"{first:.2f} s", f"{small_next:.2f} s", f"{large_next:.2f} s", *ratios))
    return [table]


def main() -> None:
    """Run the benchmarks that the command line names."""
    names = ("travel", "back", "memory", "small", "peers")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[*names, []], default=[])
    parser.add_argument("--repeat", type=int, default=7, help="how many pairs of runs a ratio is made of")
    parser.add_argument("--write", metavar="FILE", help="leave the tables in a file, too")
    given = parser.parse_args()
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as name, kernel() as one:
        one.warm_up()
        one.run(NOTEBOOK)
        # Once each way, unmeasured: pages that the machine has never touched cost more than all else.
        one.run("%%ddp --cpus 1 --out result\nresult = tensor + 0")
        one.run("%config DDPMagics.large = None\ndel result\ntensor.clone();")
        for which in given.which or names:
            match which:
                case "travel":
                    made = travel(one, given.repeat)
                case "back":
                    made = back(one, given.repeat)
                case "memory":
                    made = memory(one, Path(name))
                case "small":
                    made = small(one)
                case _:
                    made = peers(Path(name))
            for table in made:
                print(table, flush=True)
            tables += made
    if given.write:
        command = " ".join(["python benchmarks/data.py", *given.which])
        write(given.write, "Data to the ranks and back", command, tables)


if __name__ == "__main__":
    main()
