"""What a machine may lack: open files, processes, disk space, a steady clock, cores. One clear error, nothing left."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import Kernel, Reply

ALL_REDUCE = "%%ddp --cpus 2 --out y\nx = torch.ones(1)\ndist.all_reduce(x)\ny = x.item()"

# What a run is to leave as it was, in the kernel's own process.
STATE = """
import collections, os, signal, threading
def state():
    links = [os.readlink(e.path) for e in os.scandir("/proc/self/fd") if os.path.islink(e.path)]
    kinds = [link.split(":")[0] for link in links if "sqlite" not in link]  # IPython's history comes and goes
    return (
        sorted(collections.Counter(kinds).items()),
        threading.active_count(),
        [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    )
"""

# Leaves so many of 256 descriptors: a notebook that has forgotten to close files.
FILES = """
import resource
files_before = resource.getrlimit(resource.RLIMIT_NOFILE)
def leave_files(free):
    global taken
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, files_before[1]))
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    for _ in range(free):
        os.close(taken.pop())
def give_back_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, files_before)
    while taken:
        os.close(taken.pop())
"""


def prepare(kernel: Kernel) -> None:
    kernel.ok("import torch, torch.distributed as dist")
    kernel.ok(STATE)
    kernel.ok(ALL_REDUCE)


def session(kernel: Kernel) -> str:
    return str(kernel.get("__import__('nbddp')._function.client.session.root"))


def check_works(kernel: Kernel) -> None:
    kernel.ok("y = None\n")
    kernel.ok(ALL_REDUCE)
    assert kernel.get("y") == 2.0
    assert not [name for name in os.listdir(session(kernel)) if name.startswith("run-")]


NO_FILES = re.compile(r"(open files|cannot start .*: too many open files).*raise the limit \(ulimit -n\)", re.DOTALL)


def check_no_files(reply: Reply) -> None:
    """One message, and nothing around it."""
    assert reply.error in ("LaunchError", "RunLostError"), reply.traceback
    assert NO_FILES.search(reply.message), reply.message
    assert reply.traceback == f"{reply.error}: {reply.message}"
    assert reply.text == ""


@pytest.mark.parametrize("fresh", [False, True])
def test_a_notebook_that_has_used_up_its_open_files(new_kernel: Callable[..., Kernel], fresh: bool) -> None:
    kernel = new_kernel()
    kernel.ok(FILES + STATE + "import torch, torch.distributed as dist")
    if not fresh:
        prepare(kernel)
    before = None
    worked = 0
    for free in (3, 0, 20) if fresh else range(48):
        kernel.ok(f"leave_files({free})")
        reply = kernel.run(ALL_REDUCE)
        kernel.ok("give_back_files()")
        if reply.status == "ok":
            worked += 1
        else:
            assert not worked
            check_no_files(reply)
            assert reply.seconds < 2
        check_works(kernel)
        before = before or kernel.get("state()")
        assert kernel.get("state()") == before, free
    # Not more than it needs is asked for.
    assert worked >= 8 or fresh


def test_the_message_on_open_files(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok(FILES + STATE)
    prepare(kernel)
    kernel.ok("leave_files(28)")
    reply = kernel.run(ALL_REDUCE)
    kernel.ok("give_back_files()")
    assert re.fullmatch(
        r"2 ranks: following them takes 32 more open files, and this process has \d+ of the 256 that it may have\. "
        r"Close some, ask for fewer ranks, or raise the limit \(ulimit -n\) where the kernel is started",
        reply.message,
    )


def test_open_files_that_run_out_while_the_extension_is_loaded(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(load=False)
    kernel.ok("import nbddp, nbddp._magic, torch, torch.distributed as dist")
    kernel.ok(FILES + STATE)
    for free in range(6):
        kernel.ok(f"leave_files({free})")
        # %load_ext itself reads files before it comes to nbddp.
        kernel.ok("nbddp.load_ipython_extension(get_ipython())")
        check_no_files(kernel.run(ALL_REDUCE))
        kernel.ok("give_back_files()")
        check_works(kernel)
        kernel.ok("%unload_ext nbddp")


def test_open_files_that_run_out_while_ranks_connect_or_run(new_kernel: Callable[..., Kernel]) -> None:
    """Another thread takes them after the run has looked."""
    kernel = new_kernel()
    kernel.ok(FILES + STATE + "import time")
    # The thread that saves it dies without files.
    kernel.ok("get_ipython().history_manager.enabled = False")
    prepare(kernel)
    kernel.ok(
        "def take(after, free):\n"
        "    def run():\n        time.sleep(after)\n        leave_files(free)\n"
        "    threading.Thread(target=run).start()\n"
    )
    before = kernel.get("state()")
    lost = 0
    for after in (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.08, 0.6):
        for free in (0, 1, 2):
            kernel.ok(f"take({after}, {free})")
            reply = kernel.run(ALL_REDUCE + ("\nimport time\ntime.sleep(2)" if after > 0.5 else ""))
            kernel.ok("while threading.active_count() > 100: time.sleep(.01)")
            kernel.ok("time.sleep(0.1)\ngive_back_files()")
            if reply.status != "ok":
                lost += 1
                check_no_files(reply)
            check_works(kernel)
            assert kernel.get("state()") == before
    assert lost


def test_open_files_of_the_run_itself(new_kernel: Callable[..., Kernel]) -> None:
    """A hundred ranks take more of them in torchrun's process than in the kernel."""
    kernel = new_kernel()
    kernel.ok(FILES)
    prepare(kernel)
    kernel.ok("resource.setrlimit(resource.RLIMIT_NOFILE, (520, files_before[1]))")
    reply = kernel.run("%%ddp --cpus 100\npass")
    assert reply.message == (
        "100 ranks: running them takes 530 open files in one process, and a process may have 520. "
        "Ask for fewer ranks, or raise the limit (ulimit -n) where the kernel is started"
    )
    # As a rank has the notebook's variables, so it has its limits, also those that were changed after the start.
    kernel.ok("resource.setrlimit(resource.RLIMIT_NOFILE, (300, files_before[1]))")
    kernel.ok("%%ddp --cpus 1 --out limit\nlimit = resource.getrlimit(resource.RLIMIT_NOFILE)")
    assert kernel.get("limit[0]") == 300
    kernel.ok("resource.setrlimit(resource.RLIMIT_NOFILE, files_before)")
    check_works(kernel)


def test_a_rank_that_opens_too_many_files(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok(FILES)
    prepare(kernel)
    reply = kernel.run(
        "%%ddp --cpus 2\nfiles = []\nif rank == 1:\n    while True:\n        files.append(open('/dev/null'))"
    )
    assert reply.message == "rank 1 of 2 raised OSError: [Errno 24] Too many open files: '/dev/null'"
    limit = kernel.get("files_before[0]")
    assert (
        f"Most likely: too many open files; a process may have {limit}. "
        "Close some, or raise the limit (ulimit -n) where the kernel is started"
    ) in reply.traceback
    check_works(kernel)


# Another user than the one who runs the tests, with few processes of its own; one that may read everything, since the
# interpreter may lie in somebody's home.
USER = 54321
READ_ALL = "-all,+dac_read_search"
AS_USER = (
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
    *(f"--bounding-set={READ_ALL}", f"--inh-caps={READ_ALL}", f"--ambient-caps={READ_ALL}", "--"),
)

# Leaves room for so many processes and threads beside those that this user has.
PROCESSES = """
import resource
def threads():
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                total += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            pass
    return total
def leave_processes(free):
    before = 0
    while (now := threads()) != before:  # until the last run is gone
        before = now
        time.sleep(0.3)
    resource.setrlimit(resource.RLIMIT_NPROC, (now + free, processes_before[1]))
    return now + free
def give_back_processes():
    resource.setrlimit(resource.RLIMIT_NPROC, processes_before)
import time
processes_before = resource.getrlimit(resource.RLIMIT_NPROC)
"""


@pytest.fixture
def users_kernel(new_kernel: Callable[..., Kernel], tmp_path: Path) -> Kernel:
    """A kernel of another user, for whom limits on processes are not waived; nbddp is not loaded yet."""
    probe = (
        subprocess.run([*AS_USER, sys.executable, "-c", "import torch"], capture_output=True, text=True, check=False)
        if shutil.which("setpriv")
        else None
    )
    if probe is None or probe.returncode:
        why = probe.stderr.strip().splitlines()[-1:] if probe else ["there is no setpriv"]
        pytest.skip(f"NOT TESTED: no processes left; a kernel of another user takes root: {''.join(why)}")
    folder = tmp_path / "home"
    folder.mkdir()
    os.chown(folder, USER, USER)
    own = {"TMPDIR": str(folder), "HOME": str(folder), "IPYTHONDIR": str(folder / "ipython")}
    kernel = new_kernel(load=False, command=AS_USER, env=own, cwd=str(folder))
    kernel.ok(STATE + PROCESSES)
    assert kernel.get("os.getuid()") == USER
    return kernel


def check_no_processes(reply: Reply, limit: int) -> None:
    said = (
        f"the system starts no more processes and threads: this user may have {limit} (ulimit -u). "
        "End some, ask for fewer ranks, or raise the limit where the kernel is started"
    )
    if reply.error == "LaunchError":
        assert reply.message.endswith(said)
        assert reply.traceback == f"LaunchError: {reply.message}"
    else:
        assert re.match("rank [01] of 2 (raised|was killed by signal 6)", reply.message), reply.traceback
        assert f"Most likely: {said}" in reply.traceback.splitlines(), reply.traceback + reply.text


def test_no_processes_left_for_the_launcher(users_kernel: Kernel) -> None:
    kernel = users_kernel
    limit = kernel.ok("print(leave_processes(0))").text.strip()
    kernel.ok("%load_ext nbddp")
    reply = kernel.run("%%ddp --cpus 1\npass")
    kernel.ok("give_back_processes()")
    assert reply.message == (
        f"cannot start the launcher: the system starts no more processes and threads: this user may have {limit} "
        "(ulimit -u). End some, ask for fewer ranks, or raise the limit where the kernel is started"
    )
    kernel.ok("import torch, torch.distributed as dist")
    check_works(kernel)


def test_no_processes_left_for_the_agent_the_ranks_or_their_threads(users_kernel: Kernel) -> None:
    kernel = users_kernel
    kernel.ok("%load_ext nbddp")
    prepare(kernel)
    # What the launcher imports at leisure would only make this slow.
    kernel.ok("time.sleep(3)")
    seen = set()
    before = kernel.get("state()")
    for free in range(15):
        limit = int(kernel.ok(f"print(leave_processes({free}))").text)
        reply = kernel.run(ALL_REDUCE)
        kernel.ok("give_back_processes()")
        if reply.status == "error":
            check_no_processes(reply, limit)
            assert reply.seconds < 5
            seen.add(re.sub(r"[:(].*|rank \d of 2 ", "", reply.message).strip())
        check_works(kernel)
        assert kernel.get("state()") == before
    assert reply.status == "ok"
    assert {"no rank could be started", "torchrun could not start the ranks", "raised RuntimeError"} <= seen
    shm = [path for path in Path("/dev/shm").iterdir() if path.stat().st_uid == USER]
    assert [path.name for path in shm] == [os.path.basename(session(kernel))]
    assert not any(path.name.startswith("run-") for path in shm[0].iterdir())


def test_no_processes_left_for_what_a_cell_starts(users_kernel: Kernel) -> None:
    kernel = users_kernel
    kernel.ok("%load_ext nbddp")
    prepare(kernel)
    limit = int(kernel.ok("print(leave_processes(40))").text)
    reply = kernel.run(
        "%%ddp --cpus 2\nchildren = []\nwhile True:\n    if (pid := os.fork()) == 0:\n        time.sleep(9)"
    )
    assert reply.message.startswith("rank ")
    assert "raised BlockingIOError: [Errno 11] Resource temporarily unavailable" in reply.message
    check_no_processes(reply, limit)
    kernel.ok("give_back_processes()")
    # libgomp ends the process, and says why on stderr.
    reply = kernel.run(
        "%%ddp --cpus 2 --env OMP_NUM_THREADS=4\nresource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        "torch.ones(10**7).sum()"
    )
    assert "libgomp: Thread creation failed: Resource temporarily unavailable" in reply.text
    assert re.fullmatch("rank [01] of 2 left the process with status 1 before the end of the cell", reply.message)
    assert "Most likely: the system starts no more processes and threads" in reply.traceback
    check_works(kernel)
