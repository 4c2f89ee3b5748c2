"""What any engine must do: the same cells on two nodes of each, in real kernels.

An engine that is new is added to `ENGINES`; what it is to be given on a line stands there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cluster import Slurm, Sshd
from tests.kernel import Kernel

ENGINES = ("local", "slurm", "ssh")

# Nodes, even those that are processes of this machine, load torch for each run.
SECONDS = 90.0

SLEEP = "import time\nprint('begun', flush=True)\ntime.sleep(600)"


@dataclass
class Cluster:
    """Two nodes, and a kernel that reaches them.

    Attributes:
        kernel: The kernel.
        line: The magic, with what has it use them.
    """

    kernel: Kernel
    line: str

    def run(self, code: str, options: str = "--cpus 2"):  # type: ignore[no-untyped-def]  # a Reply
        """Run a cell on them."""
        return self.kernel.run(f"{self.line} {options}\n{code}", timeout=SECONDS)

    def ok(self, code: str, options: str = "--cpus 2"):  # type: ignore[no-untyped-def]  # a Reply
        """Run a cell on them that must not fail."""
        return self.kernel.ok(f"{self.line} {options}\n{code}", timeout=SECONDS)


@dataclass
class Engine:
    """An engine, and what reaches its nodes.

    Attributes:
        name: Its name.
        line: The magic, with what has it use two nodes.
        env: The environment of a kernel that reaches them.
        options: The same for `nbddp.launch`.
        left: Returns what is left on the engine's side of runs.
    """

    name: str
    line: str
    options: str
    env: Mapping[str, str | None] = field(default_factory=dict)
    left: Callable[[], list[object]] = list


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """An engine with two nodes."""
    match request.param:
        case "slurm":
            slurm: Slurm = request.getfixturevalue("_module_slurm")
            return Engine("slurm", "%%ddp --nnodes 2", "nnodes=2", slurm.env, lambda: list(slurm.squeue()))
        case "ssh":
            sshd: Sshd = request.getfixturevalue("_module_sshd")
            return Engine(
                "ssh",
                "%%ddp --hosts a,b",
                "hosts=['a', 'b']",
                sshd.env,
                lambda: [*sshd.sessions("a"), *sshd.sessions("b")],
            )
    return Engine("local", "%%ddp --engine local --nnodes 2", "nnodes=2, engine='local'")


@pytest.fixture(autouse=True)
def nothing_left_there(engine: Engine) -> Iterator[None]:
    """After every test: no job, no connection."""
    yield
    deadline = time.monotonic() + 8.0
    while (left := engine.left()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.fixture
def start(engine: Engine, new_kernel: Callable[..., Kernel]) -> Callable[[], Cluster]:
    """Start kernels that reach two nodes by the engine."""
    return lambda: Cluster(new_kernel(env=engine.env), engine.line)


@pytest.fixture(scope="module")
def _kernel(engine: Engine, private_folders: Path, open_kernels: list[Kernel]) -> Iterator[Kernel]:
    kernel = Kernel(env=dict(engine.env))
    open_kernels.append(kernel)
    kernel.ok("%load_ext nbddp")
    yield kernel
    kernel.close()
    open_kernels.remove(kernel)


@pytest.fixture
def cluster(engine: Engine, _kernel: Kernel) -> Cluster:
    """A kernel of the module's, which reaches two nodes by the engine."""
    return Cluster(_kernel, engine.line)


def processes() -> dict[str, list[psutil.Process]]:
    """Return the processes of runs on nodes, by what they are, as far as they are of this machine."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            command, environ = " ".join(process.cmdline()), process.environ()
        except psutil.Error:
            continue
        if environ.get("NBDDP_TEST_RUN") != str(os.getpid()):
            continue
        for name in ("_gateway", "_node"):
            if f"nbddp.{name}" in command:
                found.setdefault(name, []).append(process)
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            # What it has forked has its command line.
            if "nbddp._launcher" in command and (parent is None or "nbddp._node" in " ".join(parent.cmdline())):
                found.setdefault("_launcher", []).append(process)
    return found


def test_ranks_are_numbered_through_the_nodes(cluster: Cluster) -> None:
    reply = cluster.ok(
        "import torch\nimport torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\n"
        "numbers = rank, local_rank, world_size, int(t)\nfirst = rank\nprint('here')",
        "--cpus 2 --out first --gather numbers",
    )
    assert reply.lines == [f"[node{r // 2} rank {r}] here" for r in range(4)]
    assert cluster.kernel.get("first") == 0
    assert cluster.kernel.get("numbers") == [(0, 0, 4, 4), (1, 1, 4, 4), (2, 0, 4, 4), (3, 1, 4, 4)]


def test_what_the_cell_uses_gets_to_each_node_and_what_it_makes_comes_back(cluster: Cluster) -> None:
    cluster.kernel.ok("import torch\nbig = torch.arange(1 << 22)\nclass Mine:\n    def __init__(self, x): self.x = x")
    cluster.ok("made = Mine(big * (rank + 1))", "--cpus 2 --gather made")
    assert (
        cluster.kernel.get("[torch.equal(m.x, big * (r + 1)) and type(m) is Mine for r, m in enumerate(made)]")
        == [True] * 4
    )


def test_the_function_does_the_same(engine: Engine, cluster: Cluster) -> None:
    cluster.kernel.ok("import nbddp\ndef f(x):\n    import torch.distributed as dist\n    return dist.get_rank() + x")
    assert cluster.kernel.get(f"nbddp.launch(f, 10, cpus=2, {engine.options})") == [10, 11, 12, 13]


def test_the_exception_itself_with_its_rank_and_its_node(cluster: Cluster) -> None:
    reply = cluster.run("if rank == 3:\n    raise KeyError('lost')\n" + SLEEP)
    assert reply.error == "KeyError"
    assert "raise KeyError('lost')" in reply.traceback
    assert "rank 3 of 4 on node1 (" in reply.traceback
    assert "ranks 0-2: stopped" in reply.traceback


def test_displays_bars_and_values_come_through(cluster: Cluster) -> None:
    reply = cluster.ok(
        "from tqdm import tqdm\nfor i in tqdm(range(3)): pass\n"
        "display({'text/html': f'<b>{rank}</b>'}, raw=True)\nrank * 10"
    )
    assert sum("100%" in line for line in reply.lines) == 4
    assert sorted(shown["text/html"] for shown in reply.displays if "text/html" in shown)[:4] == [
        f"<b>{r}</b>" for r in range(4)
    ]
    assert reply.value is not None
    assert reply.value["text/plain"] == "0"


def test_a_display_that_is_too_large_does_not_end_the_run(cluster: Cluster) -> None:
    reply = cluster.ok(
        "if rank == 3:\n    print('before')\n    display({'text/html': 'x' * 55_000_000}, raw=True)\n"
        "    print('after')\ndisplay({'text/html': f'<b>{rank}</b>'}, raw=True)\nrank"
    )
    assert sorted(one["text/html"] for one in reply.displays if "text/html" in one)[:4] == [
        f"<b>{r}</b>" for r in range(4)
    ]
    printed = [line for line in reply.text.splitlines() if "rank 3" in line]
    assert [line[:29] for line in printed[:3]] == [
        "[node1 rank 3] before",
        "[node1 rank 3] a display of 5",
        "[node1 rank 3] after",
    ]
    assert "a display of 55.0 MB (text/html) is not shown" in printed[1]


def test_an_interrupt_says_where_all_ranks_were(cluster: Cluster) -> None:
    pressed = [0.0]

    def press() -> None:
        time.sleep(0.5)
        pressed[0] = time.monotonic()
        cluster.kernel.interrupt()

    code = (
        "import time, torch.distributed as dist\nprint('begun', flush=True)\n"
        "try:\n    dist.barrier() if rank else time.sleep(600)\nfinally:\n    print('cleaned')"
    )
    reply = cluster.kernel.run_and(f"{cluster.line} --cpus 2\n{code}", "begun", press, timeout=SECONDS)
    took = time.monotonic() - pressed[0]
    assert reply.error == "KeyboardInterrupt"
    assert "ranks 1-3: waiting in barrier on line 5 of the cell" in reply.message
    assert "rank 0: on line 5 of the cell" in reply.message
    assert sum("cleaned" in line for line in reply.lines) == 4
    assert took < 5.0


def test_ranks_that_do_not_answer_are_killed(cluster: Cluster) -> None:
    cluster.kernel.ok("%config DDPMagics.grace = 1")
    code = "import signal\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\n" + SLEEP
    code = code.replace("time.sleep(600)", "end = time.time() + 600\nwhile time.time() < end: pass")
    try:
        reply = cluster.kernel.run_and(
            f"{cluster.line} --cpus 2\n{code}", "begun", cluster.kernel.interrupt, timeout=SECONDS
        )
    finally:
        cluster.kernel.ok("%config DDPMagics.grace = 5")
    assert reply.error == "KeyboardInterrupt"
    assert "not every rank ended by itself" in reply.message


def test_a_timeout_says_where_ranks_were(cluster: Cluster) -> None:
    reply = cluster.run(SLEEP, "--cpus 2 --timeout 12")
    assert reply.error == "RunTimeout"
    assert "ranks 0-3: on line 4 of the cell: time.sleep(600)" in reply.traceback


@pytest.mark.parametrize(("how", "words"), [("os.kill(os.getpid(), 9)", "SIGKILL"), ("os._exit(5)", "status 5")])
def test_a_rank_that_dies_is_named(cluster: Cluster, how: str, words: str) -> None:
    reply = cluster.run(f"import os\nif rank == 2: {how}\n{SLEEP}")
    assert reply.error == "RankError"
    assert "rank 2 of 4 on node1" in reply.message
    assert words in reply.message


def test_a_crash_shows_its_stack(cluster: Cluster) -> None:
    reply = cluster.run(f"import ctypes\nif rank == 1: ctypes.string_at(0)\n{SLEEP}")
    assert "SIGSEGV" in reply.message
    assert "rank 1: in string_at" in reply.traceback


def test_ranks_do_not_compute_with_more_threads_than_their_node_has_cores(engine: Engine, cluster: Cluster) -> None:
    if engine.name == "ssh":
        pytest.skip("each host has all of this machine's cores, as far as it can see")
    cluster.ok("import torch\nthreads = torch.get_num_threads()", "--cpus 1 --gather threads")
    # Both nodes are this machine: under Slurm each rank has asked for one core, and locally the nodes share them.
    assert cluster.kernel.get("threads") == [1, 1]


def test_all_ranks_are_started_again(cluster: Cluster, tmp_path: Path) -> None:
    code = (
        "import os, torch, torch.distributed as dist\n"
        f"mark = {str(tmp_path / 'done')!r}\n"
        "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "if rank == 3 and attempt == 0:\n    open(mark, 'w').close()\n    raise OSError('the disk')\n"
        "t = torch.ones(1)\ndist.all_reduce(t)\nprint('attempt', attempt, int(t))"
    )
    reply = cluster.ok(code, "--cpus 2 --max-restarts 1")
    assert "nbddp: rank 3 failed (OSError: the disk); restart 1 of 1" in reply.text
    assert sorted(line for line in reply.lines if line.startswith("[node") and "attempt" in line) == [
        f"[node{r // 2} rank {r}] attempt 1 4" for r in range(4)
    ]


def test_ranks_stay(cluster: Cluster) -> None:
    kernel = cluster.kernel
    try:
        cluster.ok("import os\nheld = rank\nhere = os.getpid()", "--cpus 2 --keep")
        kernel.ok("more = list(range(300_000))")
        reply = kernel.ok("%%ddp --keep\nprint(held, len(more), here == os.getpid())")
        assert reply.lines == [f"[node{r // 2} rank {r}] {r} 300000 True" for r in range(4)]
        code = "%%ddp --keep\nimport torch.distributed as dist\nif rank == 3: raise ValueError('no')\ndist.barrier()"
        failed = kernel.run(code)
        assert failed.error == "ValueError"
        assert "the 4 ranks stay" in failed.text
        kernel.ok(
            "%%ddp --keep --out total\nimport torch, torch.distributed as dist\n"
            "t = torch.tensor([held])\ndist.all_reduce(t)\ntotal = int(t)"
        )
        assert kernel.get("total") == 6
        assert "node" in kernel.ok("%ddp status").text
        refused = kernel.run("%%ddp --keep --cpus 2 --engine local --nnodes 3\n1")
        assert "4 ranks are kept" in refused.message
    finally:
        kernel.ok("%ddp stop")


def test_the_same_kept_line_again(cluster: Cluster) -> None:
    kernel = cluster.kernel
    try:
        cluster.ok("held = rank", "--cpus 1 --keep")
        assert cluster.ok("print(held)", "--cpus 1 --keep").lines == ["[node0 rank 0] 0", "[node1 rank 1] 1"]
        for line in ("--cpus 2 --keep", "--cpus 1 --keep --python /usr/bin/other", "--gpus 1 --keep"):
            reply = cluster.run("print(held)", line)
            assert reply.error == "LaunchError"
            assert "2 ranks are kept, on the CPU, 1 on each of 2 nodes (" in reply.message
    finally:
        kernel.ok("%ddp stop")


def test_what_cells_used_is_not_kept_on_nodes(cluster: Cluster) -> None:
    kernel = cluster.kernel
    folders = [Path("/dev/shm"), Path(kernel.get("__import__('tempfile').gettempdir()"))]

    def kept() -> list[Path]:
        pids = [process.pid for process in processes()["_node"]]
        found = [path for folder in folders for pid in pids for path in folder.glob(f"nbddp-{pid}-*/run-*/closure.*")]
        return [path for path in found if path.is_symlink() or path.exists()]

    kernel.ok("import torch")
    try:
        cluster.ok("held = 0", "--cpus 2 --keep")
        for number in range(3):
            kernel.ok(f"big{number} = torch.full((10_000_000,), {number + 1}, dtype=torch.int32)")
            line = f"held += int(big{number}[-1]) + int(big0[0])"
            kernel.ok(f"%%ddp --keep --gather held\n{line}", timeout=SECONDS)
        assert kernel.get("held") == [9] * 4
        assert not kept()
        kernel.ok("other = torch.full((10_000_000,), 5, dtype=torch.int32)")
        # A failure, and not all ranks: the other node is never told.
        failed = kernel.run("%%ddp --keep --on 0\nheld = int(other[3]) / 0", timeout=SECONDS)
        assert failed.error == "ZeroDivisionError"
        assert len({path.name for path in kept()}) == 1
        kernel.ok("last = list(range(300_000))")
        kernel.ok("%%ddp --keep --gather held\nheld = len(last) + int(big2[-1])", timeout=SECONDS)
        assert kernel.get("held") == [300_003] * 4
        assert not kept()
    finally:
        kernel.ok("%ddp stop")


def test_a_run_in_the_background(cluster: Cluster) -> None:
    kernel = cluster.kernel
    cluster.ok("import time\ntime.sleep(1)\nmade = rank + 5\nprint('done')", "--cpus 1 --bg far --out made")
    assert kernel.get("far.status") == "running"
    assert kernel.get("far.wait()") == {"made": 5}
    assert "done" in kernel.get("far.log(1)")


def test_no_line_is_lost(cluster: Cluster) -> None:
    lines = 50_000
    cluster.ok(f"for i in range({lines}): print('line', i, 'of', rank)")
    log = cluster.kernel.ok("%ddp log").text
    folder = next(Path(word) for word in log.split() if "logs-" in word)
    folder = folder if folder.is_dir() else folder.parent
    for rank in range(4):
        written = (folder / f"rank{rank}.log").read_text().splitlines()
        assert written == [f"line {i} of {rank}" for i in range(lines)]


def test_the_kernels_death_ends_all(start: Callable[[], Cluster]) -> None:
    cluster = start()
    request = cluster.kernel.ask(f"{cluster.line} --cpus 2\n{SLEEP}")
    request.follow(lambda reply: reply.text.count("begun") == 4, SECONDS)
    cluster.kernel.kill()
    # The fixture that looks for what is left allows more than is promised.
    deadline = time.monotonic() + 4.0
    while (left := processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_what_never_stops_printing_holds_up_neither_a_cells_end_nor_the_next(cluster: Cluster) -> None:
    code = "import subprocess\nprocess = subprocess.Popen(['yes', 'x' * 100])\nprint('done')"
    try:
        cluster.ok(f"if rank == 2:\n{textwrap.indent(code, '    ')}", "--cpus 2 --keep")
        cluster.kernel.ok("%%ddp --keep --gather more\nmore = rank + 1", timeout=SECONDS)
        assert cluster.kernel.get("more") == [1, 2, 3, 4]
        cluster.kernel.ok("%%ddp --keep\nif rank == 2: process.kill()", timeout=SECONDS)
    finally:
        cluster.kernel.ok("%ddp stop")


@pytest.mark.parametrize("victim", ["_gateway", "_node", "_launcher"])
def test_the_death_of_what_is_in_between_ends_the_run_and_the_next_works(
    start: Callable[[], Cluster], victim: str
) -> None:
    cluster = start()
    request = cluster.kernel.ask(f"{cluster.line} --cpus 2\n{SLEEP}")
    request.follow(lambda reply: reply.text.count("begun") == 4, SECONDS)
    processes()[victim][-1].send_signal(signal.SIGKILL)
    assert request.wait(20.0)
    assert request.reply.error == "RunLostError", request.reply.traceback
    if victim != "_gateway":
        assert "node" in request.reply.message
    assert cluster.ok("print('again')").lines == [f"[node{r // 2} rank {r}] again" for r in range(4)]


def stores() -> list[psutil.Process]:
    """Return the processes that serve torch's store: of what launchers have forked, an agent has ranks."""
    forked = [child for launcher in processes()["_launcher"] for child in launcher.children()]
    return [process for process in forked if runs(process) and not process.children()]


def test_the_end_of_the_store_ends_the_run_and_a_restart_leaves_one(start: Callable[[], Cluster]) -> None:
    cluster = start()
    code = (
        "import os, time\nattempt = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "if rank == 3 and attempt == '0': raise OSError('the disk')\n"
        "if attempt == '0': time.sleep(600)\nprint('begun', flush=True)\ntime.sleep(600)"
    )
    request = cluster.kernel.ask(f"{cluster.line} --cpus 2 --max-restarts 1\n{code}")
    request.follow(lambda reply: reply.panels and reply.panels[-1]["text/plain"].count("begun") == 4, SECONDS)
    found = stores()
    if not found:
        pytest.skip("the engine's nodes are not processes of this kernel's")
    assert len(found) == 1
    found[0].send_signal(signal.SIGKILL)
    assert request.wait(20.0)
    assert request.reply.error == "RunLostError"
    assert "the process that serves torch's store" in request.reply.message
    assert "was killed by signal 9 (SIGKILL)" in request.reply.message
    assert "node0" in request.reply.message


def test_nodes_end_when_nobody_beats(start: Callable[[], Cluster]) -> None:
    cluster = start()
    request = cluster.kernel.ask(f"{cluster.line} --cpus 1\n{SLEEP}")
    request.follow(lambda reply: reply.text.count("begun") == 2, SECONDS)
    found = processes()
    found["_gateway"][0].send_signal(signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 30.0
        while any(map(runs, found["_node"])) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert time.monotonic() < deadline
    finally:
        found["_gateway"][0].send_signal(signal.SIGCONT)
    assert request.wait(20.0)
    assert request.reply.error == "RunLostError"


def runs(process: psutil.Process) -> bool:
    """Tell whether a process is there; one whose parent is stopped, and takes no note of its end, is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_panel_groups_ranks_by_node(cluster: Cluster) -> None:
    reply = cluster.ok("import time\ntime.sleep(3)")
    shown = [panel["text/plain"] for panel in reply.panels]
    rows = next(text for text in shown if text.count("running") == 4).splitlines()
    assert rows[0].startswith("nbddp: 4 ranks on 2 nodes")
    assert [row.split()[0] for row in rows[1:]] == ["node0", "rank", "node1", "rank"]
    # What nodes are at is said as long as there is no rank, and then no more.
    assert re.fullmatch(r"nbddp: 4 ranks on 2 nodes, \d+ s", rows[0])


# What a library does that gives a process a title: it lies where the environment lay from which it was started.
OVERWRITE = """
import ctypes, os
with open("/proc/self/stat") as file:
    fields = file.read().rpartition(")")[2].split()
start, end = int(fields[47]), int(fields[48])
ctypes.memset(start, 0, end - start)
with open("/proc/self/environ", "rb") as file:
    assert not file.read().strip(bytes(1))
"""


@pytest.mark.parametrize("overwritten", [False, True])
def test_only_what_the_notebook_has_set_goes_along(
    engine: Engine, new_kernel: Callable[..., Kernel], *, overwritten: bool
) -> None:
    kernel = new_kernel(load=False, env={**engine.env, "THE_SECRET": "hunter2", "CHANGED": "before"})
    kernel.ok("import os\nos.environ |= {'SET_EARLY': 'early', 'CHANGED': 'after'}")
    if overwritten:
        kernel.ok(OVERWRITE)
    kernel.ok("%load_ext nbddp\nos.environ['SET_LATE'] = 'late'")
    names = "['SET_EARLY', 'CHANGED', 'SET_LATE', 'THE_SECRET']"
    cell = f"import json, os\nprint(json.dumps([os.environ.get(name) for name in {names}]))"
    found = json.loads(Cluster(kernel, engine.line).ok(cell, "--cpus 1").lines[0].partition("] ")[2])
    # What was set before nbddp was there cannot be told then from what the notebook began with.
    set_before = ["early", "after"] if not overwritten else [None, None]
    if engine.name == "ssh":
        assert found == [*set_before, "late", None]
    else:
        # The machine's own processes, and srun's tasks, have the notebook's environment without nbddp.
        assert found == ["early", "after", "late", "hunter2"]


def test_where_cuda_does_not_work_after_a_fork_is_kept_apart(engine: Engine, start: Callable[[], Cluster]) -> None:
    cluster = start()
    forked = "'nbddp._launcher' in open('/proc/self/cmdline').read()"
    code = f"from nbddp._group import CannotForkError\nif {forked}: raise CannotForkError('told so')\nprint({forked})"
    there = "here" if engine.name == "local" else "there"
    reply = cluster.ok(code, "--cpus 1")
    assert f"nbddp: CUDA does not work in a forked process {there}; starting new ones (told so)" in reply.text
    assert "[node1 rank 1] False" in reply.text
    # It is not tried there again; and nothing is said by that of the notebook's own machine.
    assert "--start-method fork" not in cluster.ok(code, "--cpus 1 --dry-run").text
    here = cluster.kernel.ok("%%ddp --cpus 1 --dry-run\npass").text
    assert ("--start-method fork" in here) == (engine.name != "local")
