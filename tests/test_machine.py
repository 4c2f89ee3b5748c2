"""What a machine may lack: open files, processes, disk space, a steady clock, cores. One clear error, nothing left."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import LINKS, Kernel, Reply

pytestmark = pytest.mark.slow

ALL_REDUCE = "%%ddp --cpus 2 --out y\nx = torch.ones(1)\ndist.all_reduce(x)\ny = x.item()"

# What a run is to leave as it was, in the kernel's own process.
STATE = (
    LINKS
    + """
import collections, gc, os, signal, sys, threading
def state():
    # What IPython remembers: the last error, with all that its frames hold.
    sys.last_type = sys.last_value = sys.last_traceback = sys.last_exc = None
    gc.collect()
    kinds = [link.split(":")[0] for link in links() if "sqlite" not in link]  # IPython's history comes and goes
    return (
        sorted(collections.Counter(kinds).items()),
        threading.active_count(),
        [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    )
"""
)

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
    # IPython's history may have something to say of its own.
    assert reply.text == "" or "IPythonHistorySavingThread" in reply.text


@pytest.mark.parametrize("fresh", [False, True])
def test_a_notebook_that_has_used_up_its_open_files(new_kernel: Callable[..., Kernel], fresh: bool) -> None:
    kernel = new_kernel()
    # IPython's own thread for the history would find no files either, and end.
    kernel.ok(
        "history = get_ipython().history_manager\nhistory.save_thread.stop()\nhistory.enabled = False\ndel history"
    )
    kernel.ok(FILES + STATE + "import torch, torch.distributed as dist")
    if not fresh:
        prepare(kernel)
    before = None
    worked = 0
    for free in (3, 0, 20) if fresh else range(0, 48, 3):
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
        kernel.settles("state()", before)
    # Not more than it needs is asked for.
    assert worked >= 3 or fresh


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
    kernel.ok("import nbddp, nbddp._loading, torch, torch.distributed as dist")
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
    for after in (0.0, 0.02, 0.03, 0.05, 0.6):
        for free in (0, 2):
            kernel.ok(f"take({after}, {free})")
            reply = kernel.run(ALL_REDUCE + ("\nimport time\ntime.sleep(2)" if after > 0.5 else ""))
            kernel.ok("while threading.active_count() > 100: time.sleep(.01)")
            kernel.ok("time.sleep(0.1)\ngive_back_files()")
            if reply.status != "ok":
                lost += 1
                check_no_files(reply)
            check_works(kernel)
            kernel.settles("state()", before)
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
    assert reply.failure == "rank 1 of 2 raised OSError: [Errno 24] Too many open files: '/dev/null'"
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
    before = kernel.get("state()")
    for free in (0, 5, 11, 14, 15):
        limit = int(kernel.ok(f"print(leave_processes({free}))").text)
        reply = kernel.run(ALL_REDUCE)
        kernel.ok("give_back_processes()")
        # The kernel itself may have a thread more or less than a moment ago.
        if free < 12:
            assert re.fullmatch(
                r"2 ranks: running them takes 12 more processes and threads, and this user has \d+ of the "
                rf"{limit} that it may have \(ulimit -u\)\. "
                "End some, ask for fewer ranks, or raise the limit where the kernel is started",
                reply.message,
            )
            assert reply.traceback == f"LaunchError: {reply.message}"
            assert reply.seconds < 4
        else:
            # Not more than it needs is asked for.
            assert reply.status == "ok", reply.traceback
        check_works(kernel)
        kernel.settles("state()", before)
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
    assert reply.failure.startswith("rank ")
    assert "raised BlockingIOError: [Errno 11] Resource temporarily unavailable" in reply.failure
    check_no_processes(reply, limit)
    kernel.ok("give_back_processes()")
    # libgomp ends the process, and says why on stderr.
    reply = kernel.run(
        "%%ddp --cpus 2 --env OMP_NUM_THREADS=4\nresource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        "torch.ones(10**7).sum()"
    )
    assert "libgomp: Thread creation failed: Resource temporarily unavailable" in reply.text
    assert re.fullmatch("rank [01] of 2 left (the process with status 1 )?before the end of the cell", reply.message)
    assert "Most likely: the system starts no more processes and threads" in reply.traceback
    check_works(kernel)


def in_mounts(script: str) -> tuple[str, ...]:
    """Return a command that runs what follows it among mounts of its own, which a script makes."""
    command = ("unshare", "--mount", "--propagation=private", "sh", "-ec", script + '\nexec "$@"', "sh")
    probe = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"NOT TESTED: another /dev/shm; that takes root: {probe.stderr.strip()}")
    return command


SHM_READ_ONLY = "mount --bind /dev/shm /dev/shm\nmount -o remount,bind,ro /dev/shm"
SHM_FULL = "mount -t tmpfs -o size=64k none /dev/shm\ndd if=/dev/zero of=/dev/shm/x bs=1k 2>/dev/null || true"
# Semaphores of a run of two ranks take 36 kB, and those of the run before may be there for a moment.
SHM_SMALL = "mount -t tmpfs -o size=128k none /dev/shm"
SHM_ABSENT = """
dev=$(mktemp -d)
mount -t tmpfs none $dev
for name in null zero full random urandom; do touch $dev/$name; mount --bind /dev/$name $dev/$name; done
ln -s /proc/self/fd $dev/fd
mount --rbind $dev /dev
umount -l $dev
rmdir $dev
"""


@pytest.mark.parametrize(
    ("script", "end"),
    [
        (SHM_READ_ONLY, "read-only file system. Have a tmpfs there to write to"),
        (SHM_ABSENT, "no such file or directory. Have a tmpfs there to write to"),
        (SHM_FULL, "no space left on device. Make room there"),
    ],
    ids=["read-only", "absent", "full"],
)
def test_without_shared_memory(new_kernel: Callable[..., Kernel], script: str, end: str) -> None:
    kernel = new_kernel(command=in_mounts(script))
    kernel.ok(STATE + "import torch\nbig = torch.zeros(100_000)")
    for _ in range(2):
        reply = kernel.run("%%ddp --cpus 2\nbig.sum()")
        assert reply.error == "LaunchError"
        assert reply.message == (
            "torchrun could not start the ranks: it needs semaphores, whose place is /dev/shm, "
            f"and can make none there: {end}"
        )
        assert reply.traceback == f"LaunchError: {reply.message}"
    if script == SHM_FULL:
        kernel.ok("os.unlink('/dev/shm/x')\nimport torch.distributed as dist")
        check_works(kernel)


def fill(folder: Path) -> None:
    with open(folder / "filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass


UP = "%%ddp --cpus 2{}\nprint('up', flush=True)\ntime.sleep(0.5)\n"


def test_a_disk_that_is_full_in_the_middle_of_a_run(new_kernel: Callable[..., Kernel], small_disk: Path) -> None:
    kernel = new_kernel(env={"TMPDIR": str(small_disk)})
    prepare(kernel)
    kernel.ok("import time\nprint('x' * 200_000)")  # pyzmq starts a thread of its own at the first large message
    before = kernel.get("state()")

    def run(cell: str, options: str = "") -> Reply:
        reply = kernel.run_and(UP.format(options) + cell, "[rank 1] up", lambda: fill(small_disk))
        (small_disk / "filler").unlink()
        check_works(kernel)
        kernel.settles("state()", before)
        return reply

    # The log is cut, the cell has everything, and a line says so.
    reply = run("for n in range(5000):\n    print('line', n)\nw = 5", " --out w")
    assert reply.status == "ok"
    assert kernel.get("w") == 5
    for rank in (0, 1):
        mine = [line for line in reply.text.splitlines() if line.startswith(f"[rank {rank}] ")]
        assert [line for line in mine if "line" in line] == [f"[rank {rank}] line {n}" for n in range(5000)]
        assert mine.count(f"[rank {rank}] (nbddp: the log of this rank ends here: No space left on device)") == 1
    # A short log needs no room until somebody asks for it.
    kernel.ok("%%ddp --cpus 2\nprint('short')")
    fill(small_disk)
    reply = kernel.run("%ddp log --rank 1")
    assert reply.error == "LaunchError"
    assert reply.message.startswith(f"cannot write the logs in {small_disk}: no space left on device. Either make room")
    (small_disk / "filler").unlink()
    assert kernel.ok("%ddp log --rank 1").text == "short\n"
    # Errors are whole.
    reply = run("if rank == 1:\n    raise ValueError('mine')\ndist.barrier()")
    assert reply.failure == "rank 1 of 2 raised ValueError: mine"
    assert "----> 5     raise ValueError('mine')" in reply.traceback
    # Where ranks are does not fit on the disk any more; that they were interrupted is still said.
    reply = kernel.run_and(
        UP.format("") + "time.sleep(60)", "[rank 1] up", lambda: (fill(small_disk), kernel.interrupt())
    )
    assert reply.error == "KeyboardInterrupt"
    assert reply.seconds < 5
    (small_disk / "filler").unlink()
    check_works(kernel)


def test_results_for_which_neither_memory_nor_disk_has_room(
    new_kernel: Callable[..., Kernel], small_disk: Path
) -> None:
    kernel = new_kernel(env={"TMPDIR": str(small_disk)}, command=in_mounts(SHM_SMALL))
    prepare(kernel)
    kernel.ok("import time")
    reply = kernel.run_and(
        UP.format(" --out y,z") + "y, z = torch.ones(100_000), 7", "[rank 1] up", lambda: fill(small_disk)
    )
    (small_disk / "filler").unlink()
    assert reply.error == "ResultError"
    assert re.fullmatch(
        r"--out y,z: cannot bring back y, z: no room for 40[01] kB of data: there are [\d.]+ k?B in /dev/shm and "
        rf"0 B in {re.escape(str(small_disk))} free\. Make room, or set TMPDIR to a folder that has it and restart the "
        r"kernel\. Nothing was assigned",
        reply.message,
    )
    assert kernel.get("y") == 2.0
    check_works(kernel)
    # Each sees room for its own, and there is room for one.
    reply = kernel.run("%%ddp --cpus 2 --gather y\ny = torch.ones(9_000)")
    assert reply.error == "ResultError"
    assert "o space left on device" in reply.message or "no room for" in reply.failure
    check_works(kernel)


@pytest.fixture(scope="session")
def clock_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that gives a process another wall clock."""
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("NOT TESTED: clocks that jump; that takes Linux and a C compiler on PATH, cc or gcc")
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


DAY = 86_400


class Clock:
    """The wall clock of a kernel and all that it starts."""

    def __init__(self, library: Path, file: Path, ahead: int = 0) -> None:
        self._file = file
        self.env = {"LD_PRELOAD": str(library), "TEST_CLOCK": str(file)}
        file.write_bytes(struct.pack("q", ahead))

    def jump(self, ahead: int) -> None:
        with open(self._file, "r+b", buffering=0) as file:
            file.write(struct.pack("q", ahead))


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_jumps_in_the_middle_of_a_run(
    new_kernel: Callable[..., Kernel], clock_library: Path, tmp_path: Path, days: int
) -> None:
    clock = Clock(clock_library, tmp_path / "clock")
    kernel = new_kernel(env=clock.env)
    prepare(kernel)
    kernel.ok("import time")
    began = time.monotonic()
    reply = kernel.run_and(
        "%%ddp --cpus 2 --timeout 60 --out jump,y\nbegan = time.time()\ndist.barrier()\nprint('up', flush=True)\n"
        "for _ in range(5):\n    time.sleep(0.5)\n    dist.all_reduce(y := torch.ones(1))\n"
        "y = y.item()\njump = round((time.time() - began) / 86_400)",
        "[rank 1] up",
        lambda: clock.jump(days * DAY),
    )
    assert reply.status == "ok", reply.traceback
    # It did jump, for the ranks, and only the wall clock.
    assert kernel.get("jump") == days
    assert 2.5 < time.monotonic() - began < 10
    assert reply.lines == ["[rank 0] up", "[rank 1] up"]
    assert reply.panels[-1]["text/plain"] in [f"nbddp: 2 ranks done in {seconds} s" for seconds in (2, 3, 4)]
    # Back again while one hangs: neither --timeout nor the grace period takes a day.
    reply = kernel.run_and(
        "%%ddp --cpus 2 --timeout 2\nprint('up', flush=True)\ntry:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(60)",
        "[rank 1] up",
        lambda: clock.jump(0),
    )
    assert reply.message == "the run was stopped after --timeout 2 seconds"
    assert reply.seconds < 12
    check_works(kernel)


def test_a_kernel_whose_clock_is_ahead_sweeps_nothing_that_lives(
    new_kernel: Callable[..., Kernel], clock_library: Path, tmp_path: Path
) -> None:
    living = new_kernel()
    prepare(living)
    before = {path: sorted(os.listdir(path)) for path in (session(living), f"/dev/shm/{Path(session(living)).name}")}
    ahead = new_kernel(env=Clock(clock_library, tmp_path / "clock", DAY).env)
    assert ahead.get("__import__('time').time()") - time.time() == pytest.approx(DAY, abs=60)
    ahead.ok("%%ddp --cpus 1\npass")
    assert before == {path: sorted(os.listdir(path)) for path in before}
    assert launcher_lives(living)
    check_works(living)


def launcher_lives(kernel: Kernel) -> bool:
    return bool(kernel.get("__import__('nbddp')._function.client._process.poll() is None"))


@pytest.mark.alone
def test_twenty_notebooks_launch_at_the_same_moment(new_kernel: Callable[..., Kernel]) -> None:
    number = 20
    kernels = [new_kernel(load=False) for _ in range(number)]
    cell = (
        "%%ddp --cpus 2 --out y\nimport torch, torch.distributed as dist\n"
        "x = torch.tensor([{} + rank])\ndist.all_reduce(x)\ny = x.item()"
    )
    # First each starts its launcher as well, then all meet again with launchers that are there.
    for setup in ("%load_ext nbddp", "y = None"):
        for kernel in kernels:
            kernel.client.execute(setup)
        asked = [kernel.client.execute(cell.format(n)) for n, kernel in enumerate(kernels)]
        replies = [reply_to(kernel, request) for kernel, request in zip(kernels, asked, strict=True)]
        assert [reply["status"] for reply in replies] == ["ok"] * number
        assert [kernel.get("y") for kernel in kernels] == [2 * n + 1 for n in range(number)]
    # All at once, or their ends alone would take as long.
    for kernel in kernels:
        kernel.client.shutdown()


def reply_to(kernel: Kernel, request: str) -> dict[str, Any]:
    while (message := kernel.client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] != request:
        pass
    content: dict[str, Any] = message["content"]
    return content


@pytest.mark.alone
def test_a_hundred_ranks(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    prepare(kernel)
    before = kernel.get("state()")
    reply = kernel.ok(
        "%%ddp --cpus 100 --out y\nx = torch.tensor([rank])\ndist.all_reduce(x)\ny = x.item()\nprint(y)", timeout=110
    )
    assert kernel.get("y") == sum(range(100))
    assert reply.lines == sorted(f"[rank {rank:>2}] 4950" for rank in range(100))
    for cell in ("time.sleep(100)", "if rank:\n    dist.all_reduce(torch.ones(1))\ntime.sleep(100)"):
        reply = kernel.run_and(
            "%%ddp --cpus 100\nimport time\ndist.barrier()\nif rank == 0:\n    print('up', flush=True)\n" + cell,
            "up",
            lambda: (time.sleep(0.5), kernel.interrupt()),
            timeout=110,
        )
        assert reply.error == "KeyboardInterrupt"
        assert reply.text.strip() == "[rank  0] up"
        where = [line for line in reply.traceback.splitlines() if line.startswith("rank")]
        assert where == (
            ["rank 0: on line 8 of the cell: time.sleep(100)",
             "ranks 1-99: waiting in all_reduce on line 7 of the cell: dist.all_reduce(torch.ones(1))"]
            if "all_reduce" in cell
            else ["ranks 0-99: on line 6 of the cell: time.sleep(100)"]
        )  # fmt: skip
        check_works(kernel)
        kernel.settles("state()", before)
