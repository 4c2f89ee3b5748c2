"""nbddp beside its peers, in real kernels: ``python benchmarks/peers.py [--rows first,next,...]``.

Installs the peers into an environment of their own, ``.venv/peers``, in which all else is that of the interpreter that
runs this, which needs what the tests need. Each tool is used as its documentation says. They take turns; each cell has
to give the right answer, or the table has what it gives instead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import site
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv" / "peers"
REQUIREMENTS = Path(__file__).with_suffix(".txt")


def environment() -> None:
    """Go on in the environment that has the peers; make it first, if it is not there."""
    if Path(sys.prefix).resolve() == ENVIRONMENT.resolve():
        return
    made = ENVIRONMENT / "made"
    wanted = f"{sys.executable} {sys.version}\n{REQUIREMENTS.read_text()}"
    python = str(ENVIRONMENT / "bin" / "python")
    if not made.exists() or made.read_text() != wanted:
        print(f"installing the peers into {ENVIRONMENT.relative_to(ROOT)}", file=sys.stderr, flush=True)
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        where = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        folders = [*site.getsitepackages(), str(ROOT)]
        Path(where.strip(), "rest.pth").write_text("\n".join(folders) + "\n")
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(REQUIREMENTS)]
        subprocess.run(command, check=True)
        made.write_text(wanted)
    # torchrun is beside this interpreter, and not on the path where its environment is not active.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.execv(python, [python, *sys.argv])


if __name__ == "__main__":
    environment()
sys.path.insert(0, str(ROOT))

import psutil
from side_by_side import Table, machine
from tools import NOTEBOOK, TOOLS, CannotError, Fresh, Kept, KeptOfEight, Launch, NbDistributed, Px, Tool, Torchrunx

from tests.kernel import Kernel

# Stands in the environment of each kernel, and so of all that descends from it.
MARK = "NBDDP_BENCHMARK"

# Seconds until a cell is given up.
AT_MOST = 90.0
TOO_LONG = "no end within"

# Seconds of measurements after which a tool takes no more turns in a row.
ENOUGH = 20.0

# Seconds until a sleeping cell that was interrupted is given up.
INTERRUPT_AT_MOST = 40.0

# Seconds after the kernel's death at which is counted what is left of it.
LEFT_AFTER = 10.0

# Cells over which CPU time is counted.
CPU_CELLS = 50

LINES = 100_000
FLOATS = 1 << 26  # 256 MB

# One string at a time: some tools show the words of a print apart.
ALL_REDUCE = "t = torch.ones(1)\ndist.all_reduce(t)\nsay(f'rank {rank} has {t.item()}')"
TAKES = "say(f'rank {rank} has read {x.sum().item()}')"
GIVES = "y = torch.full((1 << 26,), {number}.0)\nsay(f'rank {{rank}} has made it')"
PRINTS = f"if rank == 0:\n    for i in range({LINES}): say(f'line {{i}}')"
SLEEPS = "open(f'{folder}/ready.{{rank}}', 'w').close()\nimport time\ntime.sleep(600)"

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class WrongError(Exception):
    """A cell has not given the right answer; the message says what it did."""


@dataclass
class Output:
    """What a notebook shows below a cell."""

    parts: dict[object, str] = field(default_factory=dict)
    error: str = ""

    def take(self, message: dict[str, Any]) -> None:
        """Take a message of the kernel's."""
        content = message["content"]
        match message["msg_type"]:
            case "stream":
                self.parts[len(self.parts)] = content["text"]
            case "display_data" | "execute_result" | "update_display_data":
                key = content.get("transient", {}).get("display_id", len(self.parts))
                self.parts[key] = str(content["data"].get("text/plain", ""))
            case "error":
                self.error = f"{content['ename']}: {content['evalue']}"

    @property
    def text(self) -> str:
        """All of it, without colours."""
        return _ANSI.sub("", "".join(self.parts.values()))


class Notebook:
    """A kernel in which tools are used, each loaded when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.mark = f"{os.getpid()}.{next(_numbers)}"
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        commands = self.folder / "bin"
        commands.mkdir()
        # nbdistributed ends processes by patterns, which fit other people's.
        (commands / "pkill").write_text("#!/bin/sh\n")
        (commands / "pkill").chmod(0o755)
        path = os.pathsep.join([str(commands), str(ENVIRONMENT / "bin"), os.environ["PATH"]])
        home = {"HOME": str(self.folder), "IPYTHONDIR": str(self.folder / "ipython")}
        env: dict[str, str | None] = {MARK: self.mark, "OMP_NUM_THREADS": "1", "PATH": path, **home}
        self.kernel = Kernel(env=env, cwd=str(self.folder))
        self._loaded: set[str] = set()
        self.ready: set[str] = set()
        self.run(NOTEBOOK)

    def run(self, code: str, done: Callable[[Output], bool] = lambda _: True, at_most: float = AT_MOST) -> Output:
        """Run a cell and return what it shows, which some tools only do after its end.

        Raises:
            WrongError: It takes too long.
        """
        client, output = self.kernel.client, Output()
        asked = client.execute(code, allow_stdin=False, stop_on_error=False)
        deadline, idle = time.monotonic() + at_most, False
        while not (idle and (done(output) or output.error)):
            if time.monotonic() > deadline:
                if idle:
                    break
                raise WrongError(f"{TOO_LONG} {at_most:.0f} s")
            with contextlib.suppress(queue.Empty):
                message = client.get_iopub_msg(timeout=0.2)
                output.take(message)
                if message["msg_type"] == "status" and message["parent_header"].get("msg_id") == asked:
                    idle |= message["content"]["execution_state"] == "idle"
                    if idle:
                        deadline = min(deadline, time.monotonic() + 3)
        if output.error:
            raise WrongError(output.error)
        return output

    def load(self, tool: Tool) -> None:
        """Run what comes before a tool's first cell."""
        if tool.name not in self._loaded:
            self._loaded.add(tool.name)
            for cell in tool.load():
                self.run(cell)

    def use(self, tool: Tool, code: str, expected: str, *, takes: str = "", gives: str = "") -> tuple[float, Output]:
        """Run code on a tool's ranks; return the seconds until it has shown what it must, and all that it shows.

        Args:
            tool: The tool.
            code: What the ranks run.
            expected: What has to be among what they say, as often as there are ranks.
            takes: A variable of the notebook that they use.
            gives: A variable that they give back.

        Raises:
            WrongError: The answer was not right.
            CannotError: The tool has no way to do this.
        """
        cells = tool.cells(code, takes=takes, gives=gives)
        self.load(tool)
        outputs: list[Output] = []

        def complete(output: Output) -> bool:
            return sum(o.text.count(expected) for o in [*outputs, output]) >= tool.ranks if expected else True

        began = time.perf_counter()
        for cell in cells:
            # The one that runs on the ranks is the last, but for what fetches the result.
            on_ranks = cell == (cells[-2] if cells[-1].startswith(f"{gives} = ") and gives else cells[-1])
            outputs.append(self.run(cell, complete if on_ranks else lambda _: True))
        seconds = time.perf_counter() - began
        whole = Output({i: output.text for i, output in enumerate(outputs)})
        if not complete(Output()):
            said = [line.strip() for line in whole.text.splitlines() if line.strip()]
            raise WrongError(said[-1][:100] if said else "it shows nothing")
        return seconds, whole

    def close(self) -> None:
        """Shut the kernel down, and end what it has left."""
        try:
            self.kernel.close()
        finally:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Return the processes that descend from this kernel."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def cpu_seconds(self) -> float:
        """Return the time on a core that these processes have had so far; of Linux, to the nanosecond."""
        nanoseconds = 0
        for process in self.processes():
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                with contextlib.suppress(OSError):  # it has ended
                    nanoseconds += int((task / "schedstat").read_text().split()[0])
        return nanoseconds / 1e9


_numbers = itertools.count()


@dataclass
class Result:
    """What a tool comes to in a row.

    Attributes:
        values: Its measurements.
        text: What the table says, where that is not their median.
        note: What is to be said of it below the table.
    """

    values: list[float] = field(default_factory=list)
    text: str = ""
    note: str = ""

    def __str__(self) -> str:
        if self.text:
            return self.text
        if not self.values:
            return "fails"
        return seconds_of(statistics.median(self.values))

    def with_range(self) -> str:
        """Return it with the shortest and the longest time."""
        if len(self.values) < 2 or max(self.values) == min(self.values):
            return str(self)
        return f"{self} ({seconds_of(min(self.values))}-{seconds_of(max(self.values))})"


def seconds_of(value: float) -> str:
    """Return a time with three digits."""
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


@dataclass
class Row:
    """A line of the table.

    Attributes:
        name: What is measured.
        results: What each tool comes to.
    """

    name: str
    results: dict[str, Result] = field(default_factory=dict)


class Benchmark:
    """All rows; kernels are shared among the tools that can share one, and stay from row to row.

    Args:
        folder: For temporary files.
        repeat: How many turns the tools take.
        tools: The tools.
    """

    def __init__(self, folder: Path, repeat: int, tools: Sequence[Tool]) -> None:
        self._folder = folder
        self._repeat = repeat
        self._tools = tools
        self._notebooks: dict[str, Notebook] = {}
        self._number = 1

    def close(self) -> None:
        """Close the kernels."""
        with contextlib.ExitStack() as stack:
            for notebook in self._notebooks.values():
                stack.callback(notebook.close)
        self._notebooks.clear()

    def _of(self, tool: Tool) -> Notebook:
        key = tool.name if tool.alone else ""
        if key not in self._notebooks:
            self._notebooks[key] = Notebook(self._folder)
        return self._notebooks[key]

    def _drop(self, tool: Tool) -> None:
        """Close a tool's kernel, which is of no more use."""
        notebook = self._notebooks.pop(tool.name if tool.alone else "", None)
        if notebook is not None:
            notebook.close()

    def _ready(self, tool: Tool) -> Notebook:
        """Return a kernel in which the tool has run a cell; another tool's failure may have ended the one before.

        Raises:
            WrongError: No cell runs.
        """
        notebook = self._of(tool)
        for attempt in range(3):
            if tool.name in notebook.ready:
                break
            try:
                notebook.use(tool, ALL_REDUCE, answer(tool))
                notebook.ready.add(tool.name)
            except WrongError:
                if attempt == 2:
                    raise
        return notebook

    def _take_turns(
        self, name: str, measure: Callable[[Tool, Notebook], tuple[float, str]], tools: Sequence[Tool] = ()
    ) -> Row:
        """Measure all tools in turn."""
        row = Row(name)
        failed: set[str] = set()
        for turn in range(self._repeat + 1):
            for tool in tools or self._tools:
                result = row.results.setdefault(tool.name, Result())
                if tool.name in failed or sum(result.values) > ENOUGH:
                    continue
                try:
                    seconds, text = measure(tool, self._ready(tool))
                except CannotError as error:
                    result.text, result.note = "-", str(error)
                    failed.add(tool.name)
                except WrongError as error:
                    result.text, result.note = (f"> {AT_MOST:.0f} s" if TOO_LONG in str(error) else "fails"), str(error)
                    failed.add(tool.name)
                    self._drop(tool)
                else:
                    # The first is not the next.
                    result.values += [seconds] if turn else []
                    if text:
                        result.text = f"{seconds_of(statistics.median(result.values or [seconds]))}, {text}"
        return row

    # The rows.

    def first(self) -> Row:
        """The first cell in a fresh kernel, with all that must come before it."""
        row = Row("first cell")
        for _ in range(max(1, self._repeat // 3)):
            for tool in self._tools:
                result = row.results.setdefault(tool.name, Result())
                with self._fresh() as notebook:
                    began, failures = time.perf_counter(), 0
                    while failures < 3:
                        try:
                            notebook.use(tool, ALL_REDUCE, "has 2.0")
                            break
                        except WrongError as error:
                            failures += 1
                            result.note = f"{failures} cells have failed first: {error}"
                    if failures == 3:
                        result.text = "fails"
                    else:
                        result.values.append(time.perf_counter() - began)
        return row

    @contextlib.contextmanager
    def _fresh(self) -> Iterator[Notebook]:
        notebook = Notebook(self._folder)
        try:
            yield notebook
        finally:
            notebook.close()

    def next(self) -> Row:
        """An all-reduce and a print."""
        return self._take_turns("next cell", lambda tool, n: (n.use(tool, ALL_REDUCE, "has 2.0")[0], ""))

    def into(self) -> Row:
        """A new tensor to both ranks, which read all of it."""

        def measure(tool: Tool, notebook: Notebook) -> tuple[float, str]:
            self._number += 1
            tool.cells(TAKES, takes="x")
            notebook.run(f"x = torch.full(({FLOATS},), {self._number}.0)")
            return notebook.use(tool, TAKES, f"read {float(self._number * FLOATS)}", takes="x")[0], ""

        return self._take_turns("256 MB in", measure)

    def out(self) -> Row:
        """A tensor that rank 0 makes, back in the notebook."""

        def measure(tool: Tool, notebook: Notebook) -> tuple[float, str]:
            self._number += 1
            seconds, _ = notebook.use(tool, GIVES.format(number=self._number), "has made it", gives="y")
            said = notebook.run("print('sum', y.sum().item())", lambda output: "sum" in output.text).text
            if f"sum {float(self._number * FLOATS)}" not in said:
                raise WrongError(f"the notebook has another value: {said.strip()}")
            return seconds, ""

        return self._take_turns("256 MB out", measure)

    def lines(self) -> Row:
        """Lines of one rank, and how many of them the notebook shows."""

        def measure(tool: Tool, notebook: Notebook) -> tuple[float, str]:
            seconds, output = notebook.use(tool, PRINTS, "")
            arrived = len(set(re.findall(r"line (\d+)", output.text)))
            if arrived == LINES:
                return seconds, "all"
            if isinstance(tool, Fresh):
                log = notebook.run("%ddp log --save logs", lambda o: "saved" in o.text).text
                logged = (notebook.folder / "logs" / "rank0.log").read_text().splitlines()
                if logged != [f"line {i}" for i in range(LINES)]:
                    raise WrongError(f"the log is not complete: {log}")
                return seconds, f"{arrived:,} and a line that says so; all in the log"
            return seconds, f"{arrived:,}"

        return self._take_turns(f"{LINES:,} lines", measure)

    def interrupt(self) -> Row:
        """From the stop button to the prompt, with both ranks asleep; and whether the next cell works."""
        row = Row("interrupt to prompt")
        for _ in range(max(1, self._repeat // 3)):
            for tool in self._tools:
                result = row.results.setdefault(tool.name, Result())
                try:
                    seconds, then = self._interrupt(tool)
                except WrongError as error:
                    result.text, result.note = "fails", str(error)
                    continue
                result.values.append(seconds)
                late = "> " if seconds >= INTERRUPT_AT_MOST else ""
                result.text = f"{late}{seconds_of(statistics.median(result.values))}"
                result.note = then
        return row

    def _asleep(self, tool: Tool, notebook: Notebook) -> Any:
        """Have a tool's ranks sleep; return the request."""
        cells = tool.cells(SLEEPS.format(folder=notebook.folder))
        for cell in cells[:-1]:
            notebook.run(cell)
        request = notebook.kernel.ask(cells[-1])
        deadline = time.monotonic() + AT_MOST
        while not all((notebook.folder / f"ready.{rank}").exists() for rank in range(2)):
            request.wait(0.05)
            if time.monotonic() > deadline or request.returned_at is not None:
                raise WrongError("the ranks never began")
        request.wait(1.0)
        return request

    def _interrupt(self, tool: Tool) -> tuple[float, str]:
        with self._ready_one(tool) as notebook:
            request = self._asleep(tool, notebook)
            began = time.monotonic()
            notebook.kernel.interrupt()
            request.wait(INTERRUPT_AT_MOST)
            seconds = (request.returned_at or time.monotonic()) - began
            if request.returned_at is None:
                return seconds, "the cell goes on"
            then = "the cell counts as one that has succeeded" if request.failed_at is None else ""
            try:
                notebook.use(tool, ALL_REDUCE, "has 2.0")
            except WrongError as error:
                return seconds, f"the next cell fails ({error})"
            return seconds, then

    @contextlib.contextmanager
    def _ready_one(self, tool: Tool) -> Iterator[Notebook]:
        """Give a kernel of its own, in which the tool has run a cell if it can run two."""
        with self._fresh() as notebook:
            notebook.load(tool)
            if tool.name != "accelerate":  # of which only the first cell works
                for attempt in range(3):
                    with contextlib.suppress(WrongError):
                        notebook.use(tool, ALL_REDUCE, "has 2.0")
                        break
                    if attempt == 2:
                        raise WrongError("it runs no cell")
            yield notebook

    def kill(self) -> Row:
        """The processes that are there some seconds after the kernel was killed with both ranks asleep."""
        row = Row(f"processes {LEFT_AFTER:.0f} s after SIGKILL of the kernel")
        for _ in range(max(1, self._repeat // 3)):
            for tool in self._tools:
                result = row.results.setdefault(tool.name, Result())
                try:
                    with self._ready_one(tool) as notebook:
                        self._asleep(tool, notebook)
                        notebook.kernel.kill()
                        time.sleep(LEFT_AFTER)
                        result.values = [max([len(notebook.processes()), *result.values])]
                except WrongError as error:
                    result.text, result.note = "fails", str(error)
                else:
                    result.text = f"{result.values[0]:.0f}" if result.values[0] else "none"
        return row

    def goals(self) -> list[tuple[str, ...]]:
        """The ratios that are promised, each of pairs that were taken in turn."""
        rows: list[tuple[str, ...]] = []
        # Of cells that take milliseconds the median of some for each: the machine's own scatter is as large.
        for name, one, other, goal, each in (
            ("a kept cell beside %%px", Kept(), Px(), "<= 0.6", 9),
            ("a kept cell beside %%distributed", Kept(), NbDistributed(), "< 0.1", 5),
            ("launch(f) beside torchrunx' Launcher.run(f)", Launch(), Torchrunx(), "<= 0.05", 1),
            ("a kept cell, 8 ranks beside 2", KeptOfEight(), Kept(), "<= 2", 9),
        ):
            times: tuple[list[float], list[float]] = ([], [])
            try:
                for tool in (one, other):
                    self._ready(tool)
                for _ in range(max(3, self._repeat)):
                    for tool, found in zip((one, other), times, strict=True):
                        expected = answer(tool)
                        turn = [self._of(tool).use(tool, ALL_REDUCE, expected)[0] for _ in range(each)]
                        found.append(statistics.median(turn))
            except WrongError as error:
                rows.append((name, "", "", f"fails: {error}", "", goal))
                continue
            pairs = sorted(a / b for a, b in zip(*times, strict=True))
            ours, theirs = map(statistics.median, times)
            spread = f"{pairs[0]:.3f}-{pairs[-1]:.3f}"
            rows.append((name, seconds_of(ours), seconds_of(theirs), f"{ours / theirs:.3f}", spread, goal))
            if each > 1:
                # Beside other work a cell takes what that leaves it; this is its own.
                cpu = [self._cpu_seconds(tool) for tool in (one, other)]
                rows.append(("... in CPU time", *map(seconds_of, cpu), f"{cpu[0] / cpu[1]:.3f}", "", ""))
        return rows

    def _cpu_seconds(self, tool: Tool) -> float:
        """Return the CPU time of all processes for a cell of a tool whose ranks stay."""
        notebook = self._of(tool)
        began = notebook.cpu_seconds()
        for _ in range(CPU_CELLS):
            with contextlib.suppress(WrongError):  # now and then ipyparallel shows nothing of a rank for seconds
                notebook.use(tool, ALL_REDUCE, answer(tool))
        return (notebook.cpu_seconds() - began) / CPU_CELLS


def answer(tool: Tool) -> str:
    """Return what each rank says that has taken part in `ALL_REDUCE`."""
    return f"has {tool.ranks}.0"


def main() -> None:
    """Measure the rows that the command line names."""
    names = ("first", "next", "into", "out", "lines", "interrupt", "kill", "goals")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(names), help=f"which of {','.join(names)}")
    parser.add_argument("--tools", default="", help="which tools, by the beginnings of their names")
    parser.add_argument("--repeat", type=int, default=5, help="how many turns a figure is made of")
    parser.add_argument("--results", metavar="FILE", help="keep what is measured in a file, and measure what it lacks")
    parser.add_argument("--write", metavar="FILE", help="leave the tables in a file, too")
    parser.add_argument("--plot", metavar="FILE", help="leave a plot of the times in a file")
    given = parser.parse_args()
    tools = [tool for tool in TOOLS if tool.name.startswith(tuple(given.tools.split(",")))]
    kept = Path(given.results) if given.results else None
    results: dict[str, Any] = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    # In the background of a script an interrupt is ignored; and whichever way this ends, kernels are closed.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as name:
        os.environ["TMPDIR"] = name
        benchmark = Benchmark(Path(name), given.repeat, tools)
        try:
            for which in [which for which in given.rows.split(",") if which not in results]:
                results[which] = benchmark.goals() if which == "goals" else asdict(getattr(benchmark, which)())
                print(f"{which}: {results[which]}", file=sys.stderr, flush=True)
                if kept is not None:
                    kept.write_text(json.dumps(results, indent=1))
        finally:
            benchmark.close()
    rows = [
        Row(results[which]["name"], {tool: Result(**result) for tool, result in results[which]["results"].items()})
        for which in names
        if which in results and which != "goals"
    ]
    tables = [table_of(rows, tools)]
    if "goals" in results:
        tables.append(Table("Goals", ("what", "nbddp", "beside", "ratio", "pairs", "goal"), results["goals"]))
    text = "\n".join([*map(str, tables), *notes_of(rows)])
    print(text)
    if given.write:
        head = f"# nbddp beside its peers\n\n`python benchmarks/peers.py` on {machine()}, two ranks on the CPU.\n\n"
        Path(given.write).write_text(head + text + "\n")
    if given.plot:
        plot(rows, tools, given.plot)


def table_of(rows: Sequence[Row], tools: Sequence[Tool]) -> Table:
    """Return the table, a line for each tool."""
    table = Table("From a notebook: medians, and the range in brackets", ("", *(row.name for row in rows)))
    for tool in tools:
        table.rows.append((tool.name, *(row.results[tool.name].with_range() for row in rows)))
    return table


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Return what is to be said of single results."""
    return [
        f"- {row.name}, {name}: {result.note}" for row in rows for name, result in row.results.items() if result.note
    ]


# In the plot, nbddp's bars are of one colour, the others' of another.
_OURS, _OTHERS = "#0969da", "#8c959f"


def plot(rows: Sequence[Row], tools: Sequence[Tool], path: str) -> None:
    """Draw a chart for each row, with a bar for each tool."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(2 + 3.2 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    names = [tool.name for tool in reversed(tools)]
    for number, (axis, row) in enumerate(zip(axes.flat, rows, strict=False)):
        results = [row.results[name] for name in names]
        medians = [statistics.median(result.values) if result.values else 0.0 for result in results]
        counts = "SIGKILL" in row.name
        colours = [_OURS if name.startswith("%%ddp") else _OTHERS for name in names]
        axis.barh(range(len(names)), medians, color=colours)
        if not counts:
            shortest = min((median for median in medians if median), default=1.0)
            axis.set_xscale("log")
            axis.set_xlim(shortest / 3, max(medians, default=1.0) * 30)
        else:
            axis.set_xlim(0, max(medians, default=1.0) * 1.5 + 1)
        for place, (median, result) in enumerate(zip(medians, results, strict=True)):
            text = "cannot" if result.text == "-" else str(result).partition(" and a line")[0]
            start = median if median else axis.get_xlim()[0]
            axis.annotate(f" {text}", (start, place), va="center", fontsize=8)
        axis.set_title(row.name, fontsize=10, loc="left")
        axis.set_yticks(range(len(names)), names if number % columns == 0 else [""] * len(names), fontsize=9)
        axis.set_xticks([])
        axis.tick_params(which="both", length=0)
        axis.minorticks_off()
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
    figure.suptitle("Two CPU ranks from a notebook; shorter is better; times on a logarithmic scale", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
