"""nbddp beside bare torchrun: ``python benchmarks/run.py [latency] [first] [memory] [throughput]``.

Every figure that the README quotes is a ratio of two medians that were taken in turn, in the same run on the same
machine; absolute times move with the machine. ``--write FILE`` leaves the tables as Markdown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from side_by_side import IMPORTS, Table, kernel, pss, ratio_row, write

# The same code, as the user would write it for torchrun and for a cell.
SETUP = "dist.init_process_group('gloo')\nrank, world_size = dist.get_rank(), dist.get_world_size()\n"
# With a DDP object alive at the end of the interpreter gloo aborts in one of four bare runs; leaving this way is also
# faster, for torchrun.
TEARDOWN = "\ndist.destroy_process_group()\nimport sys; sys.stdout.flush(); os._exit(0)\n"

ALL_REDUCE = "t = torch.ones(1)\ndist.all_reduce(t)\nprint(rank, t.item())"

ONE_STEP = """
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.nn.functional.cross_entropy(model(torch.randn(32, 64)), torch.randint(10, (32,))).backward()
optimizer.step()
print(rank, 'stepped')
"""

# Idle after a step, until the file is there.
IDLE = ONE_STEP + "print('idle', flush=True)\nwhile not os.path.exists({path!r}): time.sleep(0.05)\n"

# Both train at the same time but take turns, so that each pair of figures is from the same second: the machine's own
# speed drifts by more than the difference that is looked for.
TRAINING = """
torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = torch.randn(1024, 1, 16, 16), torch.randint(10, (1024,))
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
    torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
    torch.nn.Flatten(), torch.nn.Linear(512, 10),
)
model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.Adam(model.parameters())
losses, rates = [], []
for turn in range({turns}):
    while rank == 0 and not os.path.exists(f'{folder}/{me}.{{turn}}'):
        time.sleep(0.001)
    dist.barrier()
    began = time.perf_counter()
    for step in range(turn * {steps}, turn * {steps} + {steps}):
        batch = torch.arange(step * 64 + rank * 32, step * 64 + rank * 32 + 32) % 1024
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    dist.barrier()
    rates.append({steps} / (time.perf_counter() - began))
    if rank == 0:
        open(f'{folder}/{other}.{{turn + {later}}}', 'w').close()
if rank == 0:
    print('RESULT', *rates, '|', *[value.hex() for value in losses])
"""
TURNS, STEPS = 80, 30


class Torchrun:
    """Bare torchrun on scripts in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def command(self, body: str, ranks: int) -> list[str]:
        """Return the command that runs `body` as a script."""
        script = self._folder / "script.py"
        script.write_text(IMPORTS + SETUP + body + TEARDOWN)
        torchrun = shutil.which("torchrun", path=os.path.dirname(sys.executable)) or "torchrun"
        logs = str(self._folder / "logs")
        return [torchrun, "--standalone", "--nproc-per-node", str(ranks), "--log-dir", logs, str(script)]

    def run(self, body: str, ranks: int) -> tuple[float, str]:
        """Run `body`; return the seconds it took and what it printed."""
        command = self.command(body, ranks)
        began = time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(ranks))
        seconds = time.perf_counter() - began
        if run.returncode:
            raise RuntimeError(run.stderr)
        return seconds, run.stdout


def environment(ranks: int) -> dict[str, str]:
    """Return an environment with the thread count that nbddp gives its ranks."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def latency(torchrun: Torchrun, repeat: int) -> list[Table]:
    """A fresh cell, from the request to the kernel's idle, and bare torchrun on the same code."""
    table = Table("A fresh cell", ("cell", "nbddp", "torchrun", "ratio", "pairs", "goal"))
    with kernel() as notebook:
        notebook.warm_up()
        for name, body, ranks, goal in (
            ("all-reduce and print, 2 ranks", ALL_REDUCE, 2, "<= 0.03"),
            ("all-reduce and print, 8 ranks", ALL_REDUCE, 8, "<= 0.08"),
            ("model, DDP, optimizer, one step, 2 ranks", ONE_STEP, 2, "<= 0.06"),
        ):
            ours, bare = [], []
            for _ in range(repeat):
                # Nine cells for one torchrun: their median, so that the pair is as steady as the slower of the two.
                ours.append(statistics.median(notebook.run(f"%%ddp --cpus {ranks}\n{body}")[0] for _ in range(9)))
                bare.append(torchrun.run(body, ranks)[0])
            table.rows.append(ratio_row(name, ours, bare, goal))
    return [table, breakdown(2), breakdown(8)]


def breakdown(ranks: int) -> Table:
    """Where the time of a fresh cell goes, from inside one process (no kernel, no messages)."""
    import torch
    import torch.distributed as dist

    from nbddp import _function, _job
    from nbddp._options import Options
    from nbddp._script import Cell

    class Nowhere:
        in_place = False

        def write(self, text: str) -> None:
            pass

        def publish(self, *_: Any) -> None:
            pass

        def panel(self, data: dict[str, Any]) -> None:
            pass

        def clear(self, *, wait: bool) -> None:
            pass

        def room(self) -> int:
            return sys.maxsize

    names = {"torch": torch, "dist": dist}
    job = _job.Job(Cell(ALL_REDUCE, "<cell>", 1), names, names, Options(cpus=ranks))
    _job.perform(job, _function.client, Nowhere())
    time.sleep(4)  # the launcher imports the rest
    stages: dict[str, list[float]] = {}
    for _ in range(20):
        times = _job.perform(job, _function.client, Nowhere()).times | {"returned": time.monotonic()}
        previous = times.pop("began")
        for stage, at in sorted(times.items(), key=lambda item: item[1]):
            stages.setdefault(stage, []).append(at - previous)
            previous = at
    table = Table(f"Where the time goes, {ranks} ranks", ("until", "milliseconds"))
    table.rows = [(stage, f"{statistics.median(values) * 1e3:.1f}") for stage, values in stages.items()]
    total = sum(statistics.median(values) for values in stages.values())
    table.rows.append(("in all", f"{total * 1e3:.1f}"))
    return table


def first(torchrun: Torchrun, repeat: int) -> list[Table]:
    """The first cell right after %load_ext, in a fresh kernel."""
    table = Table("The first cell, %load_ext included", ("cell", "nbddp", "torchrun", "ratio", "pairs", "goal"))
    ours, bare = [], []
    for _ in range(repeat):
        with kernel() as notebook:
            notebook.run(IMPORTS)
            began = time.perf_counter()
            notebook.run("%load_ext nbddp")
            notebook.run(f"%%ddp --cpus 2\n{ALL_REDUCE}")
            ours.append(time.perf_counter() - began)
        bare.append(torchrun.run(ALL_REDUCE, 2)[0])
    table.rows.append(ratio_row("all-reduce and print, 2 ranks", ours, bare, "<= 1"))
    return [table]


def memory(torchrun: Torchrun, folder: Path) -> list[Table]:
    """PSS of four idle ranks that have taken a DDP step, with everything that belongs to them."""
    ranks, stop = 4, folder / "stop"
    body = IDLE.format(path=str(stop))
    sizes = {}
    with kernel() as notebook:
        notebook.warm_up()

        def measure(text: str) -> None:
            seen.append(text)
            if "".join(seen).count("idle") == ranks and not stop.exists():
                time.sleep(1)
                launcher = psutil.Process(notebook.pid).children()[0]
                sizes["nbddp"] = pss([launcher, *launcher.children(recursive=True)])
                stop.touch()

        seen: list[str] = []
        notebook.run(f"%%ddp --cpus {ranks}\n{body}", measure)
    stop.unlink()
    process = subprocess.Popen(
        torchrun.command(body, ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(ranks),
    )
    assert process.stdout is not None
    idle = 0
    for line in process.stdout:
        idle += line.count("idle")
        if idle == ranks and not stop.exists():
            time.sleep(1)
            agent = psutil.Process(process.pid)
            sizes["torchrun"] = pss([agent, *agent.children(recursive=True)])
            stop.touch()
    process.wait()
    table = Table(
        "Memory of four idle DDP ranks, launcher and agent included (PSS)", ("", "nbddp", "torchrun", "ratio", "goal")
    )
    ratio = sizes["nbddp"] / sizes["torchrun"]
    table.rows.append(
        ("in all", f"{sizes['nbddp'] / 1e6:.0f} MB", f"{sizes['torchrun'] / 1e6:.0f} MB", f"{ratio:.3f}", "<= 0.5")
    )
    return [table]


def throughput(torchrun: Torchrun, folder: Path) -> list[Table]:
    """Training steps a second inside the cell and in the script, and whether they compute the same."""
    turns = {"turns": TURNS, "steps": STEPS, "folder": folder}
    ours = TRAINING.format(me="nbddp", other="torchrun", later=0, **turns)
    bare = TRAINING.format(me="torchrun", other="nbddp", later=1, **turns)
    (folder / "nbddp.0").touch()
    with kernel() as notebook:
        notebook.warm_up()
        process = subprocess.Popen(torchrun.command(bare, 2), stdout=subprocess.PIPE, text=True, env=environment(2))
        launcher = psutil.Process(notebook.pid).children()[0]
        used: list[float] = []

        def look(_: str) -> None:
            # Agents look at their ranks in the other's turns, too, so that what this costs is not in the ratio.
            agent = launcher.children()[0].cpu_times()
            used.append(agent.user + agent.system)

        seconds, text = notebook.run(f"%%ddp --cpus 2\n{ours}", look)
        outputs = [text, process.communicate()[0]]
    results = [next(line for line in text.splitlines() if "RESULT" in line).split("RESULT ")[1] for text in outputs]
    # The first turns import, allocate and warm caches.
    rates = [[float(rate) for rate in result.split(" | ")[0].split()][5:] for result in results]
    medians = [statistics.median(one) for one in rates]
    pairs = sorted(a / b for a, b in zip(*rates, strict=True))
    ratio = statistics.median(pairs)
    table = Table("Training throughput, 2 ranks", ("steps a second", "nbddp", "torchrun", "ratio", "pairs", "goal"))
    row = (f"{medians[0]:.1f}", f"{medians[1]:.1f}", f"{ratio:.3f}", f"{pairs[0]:.3f}-{pairs[-1]:.3f}", ">= 0.98")
    table.rows.append(("small CNN, 1 thread a rank", *row))
    same = results[0].split(" | ")[1] == results[1].split(" | ")[1]
    equal = "equal to the last bit" if same else "DIFFERENT"
    table.rows.append((f"{TURNS * STEPS} losses, equal seeds", equal, "", "", "", "equal"))
    table.rows.append(("nbddp's agent, of one core", f"{used[-1] / seconds:.1%}", "", "", "", ""))
    return [table]


def main() -> None:
    """Run the benchmarks that the command line names."""
    names = ("latency", "first", "memory", "throughput")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[*names, []], default=[])
    parser.add_argument("--repeat", type=int, default=5, help="how many pairs of runs a ratio is made of")
    parser.add_argument("--write", metavar="FILE", help="leave the tables in a file, too")
    given = parser.parse_args()
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torchrun = Torchrun(folder)
        for which in given.which or names:
            match which:
                case "latency":
                    made = latency(torchrun, given.repeat)
                case "first":
                    made = first(torchrun, given.repeat)
                case "memory":
                    made = memory(torchrun, folder)
                case _:
                    made = throughput(torchrun, folder)
            for table in made:
                print(table, flush=True)
            tables += made
    if given.write:
        command = " ".join(["python benchmarks/run.py", *given.which])
        write(given.write, "nbddp beside bare torchrun", command, tables)


if __name__ == "__main__":
    main()
