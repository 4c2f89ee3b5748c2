"""%ddp doctor, under the conditions that it is for: real limits, file systems, name servers that keep silent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nbddp import _gpus
from tests.kernel import Kernel

# The kernel's main thread gets a name, mounts or a network of its own; so do the processes that it starts. Sockets that
# the kernel has opened before, to its front end, stay as they are.
UNSHARE = """
import ctypes, os, socket, subprocess
def unshare(flag):
    if ctypes.CDLL(None, use_errno=True).unshare(flag):
        raise OSError(ctypes.get_errno(), "unshare")
def sh(command):
    subprocess.run(command, shell=True, check=True)
MOUNTS, HOST_NAME, NETWORK = 0x00020000, 0x04000000, 0x40000000
"""
PRIVATE_MOUNTS = "unshare(MOUNTS)\nsh('mount --make-rprivate /')\n"
NO_SUCH_HOST = "unshare(HOST_NAME)\nsocket.sethostname('no-such-host')\n"


def finding(text: str, subject: str) -> str:
    """Return the one line on a subject, with single spaces."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    found = [line for line in lines if line.split(" ", 1)[-1].startswith(subject)]
    assert len(found) == 1, text
    return found[0]


def doctor(kernel: Kernel) -> str:
    return kernel.ok("%ddp doctor").text


@pytest.fixture
def own_kernel(new_kernel: Callable[..., Kernel]) -> Callable[[str], Kernel]:
    """Start a kernel, put its main thread into surroundings of its own, and load the extension there."""

    def start(code: str) -> Kernel:
        kernel = new_kernel(load=False)
        reply = kernel.run(UNSHARE + code)
        if reply.error in ("OSError", "PermissionError", "CalledProcessError"):
            pytest.skip(f"NOT TESTED: %ddp doctor in surroundings of its own, which takes root: {reply.message}")
        assert reply.status == "ok", reply.traceback
        kernel.ok("%load_ext nbddp")
        return kernel

    return start


def test_a_sound_machine(kernel: Kernel) -> None:
    kernel.ok("%%ddp --cpus 2\n1")  # torch is imported
    reply = kernel.ok("%ddp doctor")
    lines = reply.text.splitlines()
    assert lines[-1] == "nbddp: nothing found that would stop a run", reply.text
    assert {line[:4] for line in lines[:-1]} == {"ok  "}
    # In columns, and everything that was asked for.
    assert {line[6:21].rstrip() for line in lines[:-1]} >= {
        *("versions", "GPUs", "/dev/shm", "temp space", "memory", "open files", "processes", "locked memory"),
        *("core files", "cores", "host name", "loopback", "launcher", "all-reduce"),
    }
    assert all(line[4:6] == line[19:21] == "  " and line[21] != " " for line in lines[:-1])
    assert "gloo, 2 ranks on the CPU" in finding(reply.text, "all-reduce")
    assert reply.seconds < 8
    assert kernel.get("'torch' in __import__('sys').modules and __import__('torch').cuda.is_initialized()") is False


def test_it_takes_no_arguments_and_the_help_has_it(kernel: Kernel) -> None:
    assert "nothing follows %ddp doctor (%ddp -h)" in kernel.run("%ddp doctor now").stderr
    assert "%ddp doctor" in kernel.ok("%ddp -h").text


def test_the_log_of_the_run_before_stays(kernel: Kernel) -> None:
    kernel.ok("%%ddp --cpus 1\nprint('the last words of a run')")
    kernel.ok("import os\nfrom nbddp._function import client")
    count = "sum(name.startswith('logs-') for name in os.listdir(client.session.root))"
    kernel.ok("%ddp log")  # which makes them files
    before = kernel.get(count)
    doctor(kernel)
    assert kernel.ok("%ddp log --rank 0").text == "the last words of a run\n"
    assert kernel.get(count) == before == 1


def test_few_open_files(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("import resource\nhard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]")
    kernel.ok("resource.setrlimit(resource.RLIMIT_NOFILE, (140, hard))")
    text = doctor(kernel)
    found = re.fullmatch(
        r"warn open files 140 at once, \d+ open now: enough to follow (\d+) ranks, but few for DataLoader workers. "
        r"ulimit -n 4096 where the kernel is started",
        finding(text, "open files"),
    )
    assert found is not None, text
    assert text.endswith("nbddp: 1 thing to look at\n")
    # The same reckoning as that of a run, but for a file that comes and goes.
    enough = int(found[1])
    assert kernel.run(f"%%ddp --cpus {enough + 2}\n1").error == "LaunchError"
    kernel.ok(f"%%ddp --cpus {enough - 2}\n1", timeout=120)
    kernel.ok("import os\nfew = len(os.listdir('/proc/self/fd')) + 28")
    kernel.ok("resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))")
    assert re.match(r"bad open files \d+ at once", finding(doctor(kernel), "open files"))


def test_a_container_with_few_processes(own_kernel: Callable[[str], Kernel]) -> None:
    kernel = own_kernel(
        "from pathlib import Path\nroots = [Path('/sys/fs/cgroup/pids'), Path('/sys/fs/cgroup')]\n"
        "root = next(root for root in roots if (root / 'cgroup.procs').exists())\n"
        "group = root / f'nbddp-test-{os.getpid()}'\ngroup.mkdir()\n"
        "(group / 'pids.max').write_text('100')\n(group / 'cgroup.procs').write_text(str(os.getpid()))"
    )
    line = finding(doctor(kernel), "processes")
    assert re.match(r"warn processes \d+ more can be started, threads included; \d+ of 100 in use", line)
    assert "2 ranks can need 128, DataLoader workers included" in line
    kernel.ok("(root / 'cgroup.procs').write_text(str(os.getpid()))\n%unload_ext nbddp")
    kernel.ok("group.rmdir()")


def test_few_processes_for_a_user() -> None:
    if os.getuid() != 0:
        pytest.skip("NOT TESTED: the limit on a user's processes; a user without any takes root")
    code = (
        "import os, resource\nfrom nbddp._checks import processes\nos.setuid(54322)\n"
        "for limit in (20, 100, 1000):\n    resource.setrlimit(resource.RLIMIT_NPROC, (limit, 1000))\n"
        "    print(processes(2).line())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [" ".join(line.split()) for line in run.stdout.splitlines()]
    assert lines[0].startswith("bad processes 19 more can be started, threads included; 1 of 20 in use (ulimit -u). ")
    assert lines[1].startswith("warn processes 99 more")
    assert lines[1].endswith("Raise ulimit -u, or end processes that are not needed")
    assert lines[2] == "ok processes 999 more can be started, threads included; 1 of 1000 in use (ulimit -u)"


def test_a_folder_for_temporary_files_that_all_may_write(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    kernel = new_kernel(env={"TMPDIR": str(tmp_path)})
    line = finding(doctor(kernel), "temp space")
    assert line.startswith(f"warn temp space {tmp_path} has mode 0777: whoever has an account here can replace")
    assert f"chmod +t {tmp_path}" in line
    tmp_path.chmod(0o1777)
    assert finding(doctor(kernel), "temp space").startswith("ok temp space")


def test_little_room_for_temporary_files(new_kernel: Callable[..., Kernel], small_disk: Path) -> None:
    kernel = new_kernel(env={"TMPDIR": str(small_disk)}, load=False)
    found = kernel.get("[f.line() for f in __import__('nbddp._doctor')._doctor.quick()]")
    assert any(re.search(r"^warn  temp space +\d+(\.\d)? kB free in", line) for line in found), found


def test_a_small_dev_shm(own_kernel: Callable[[str], Kernel]) -> None:
    kernel = own_kernel(PRIVATE_MOUNTS + "sh('mount -t tmpfs -o size=64m none /dev/shm')")
    text = doctor(kernel)
    line = finding(text, "/dev/shm")
    assert re.match(r"warn /dev/shm 67.\d MB free of 67.1 MB; NCCL and DataLoader workers die or hang", line)
    assert "--shm-size=8g or --ipc=host" in line
    assert text.endswith("nbddp: 1 thing to look at\n")


def test_a_host_name_without_an_address(own_kernel: Callable[[str], Kernel]) -> None:
    kernel = own_kernel(
        PRIVATE_MOUNTS
        + NO_SUCH_HOST
        + "import tempfile\nempty = tempfile.NamedTemporaryFile()\nsh(f'mount --bind {empty.name} /etc/resolv.conf')\n"
        # Nobody listens there: the answer is an error, at once.
        "empty.write(b'nameserver 127.0.0.3\\n')\nempty.flush()"
    )
    line = finding(doctor(kernel), "host name")
    assert line.startswith("warn host name no-such-host, the name of this machine, has no address")
    assert "'127.0.1.1 no-such-host' to /etc/hosts" in line


@pytest.fixture
def silent(own_kernel: Callable[[str], Kernel]) -> Kernel:
    """A kernel whose name server takes questions and answers none."""
    return own_kernel(
        PRIVATE_MOUNTS
        + NO_SUCH_HOST
        + "import tempfile\nsilent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nsilent.bind(('127.0.0.2', 53))\n"
        "conf = tempfile.NamedTemporaryFile()\nconf.write(b'nameserver 127.0.0.2\\n')\nconf.flush()\n"
        "sh(f'mount --bind {conf.name} /etc/resolv.conf')"
    )


def test_a_name_server_that_keeps_silent(silent: Kernel) -> None:
    silent.ok("import nbddp._doctor, nbddp._probe\nnbddp._probe.DEADLINES['gloo'] = 3.0")
    text = doctor(silent)
    line = finding(text, "host name")
    assert line.startswith("warn host name looking up no-such-host, the name of this machine, takes longer than 2 s;")
    assert "'127.0.1.1 no-such-host' to /etc/hosts" in line
    # And so it is: torchrun by itself would wait 20 s before it starts the ranks.
    assert finding(text, "all-reduce").startswith("ok")
    assert "nbddp: 1 thing to look at\n" in text

    reply = silent.ok("found = nbddp._doctor.quick()")
    assert reply.seconds < 3
    assert silent.get("[(f.level, f.subject) for f in found]") == [("warn", "host name")]


def test_loopback_that_is_down(own_kernel: Callable[[str], Kernel]) -> None:
    kernel = own_kernel("unshare(NETWORK)")
    line = finding(doctor(kernel), "loopback")
    assert (
        line
        == "bad loopback ranks cannot reach each other at 127.0.0.1: network is unreachable. As root: ip link set lo up"
    )


def test_what_a_launcher_left_in_the_environment(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(env={"RANK": "3", "MASTER_ADDR": "node7", "WORLD_SIZE": "8", "NCCL_DEBUG": "WARN"})
    text = doctor(kernel)
    assert "warn environment RANK=3, WORLD_SIZE=8, MASTER_ADDR=node7: ranks get torchrun's own" in " ".join(
        text.split()
    )
    assert "ok environment ranks get NCCL_DEBUG=WARN" in " ".join(text.split())
    # It is true: they do.
    assert kernel.ok("%%ddp --cpus 2\nimport os\nprint(os.environ['RANK'], os.environ['MASTER_ADDR'])").lines == [
        "[rank 0] 0 127.0.0.1",
        "[rank 1] 1 127.0.0.1",
    ]
    # They are not why ranks do not start.
    assert kernel.get("[f.line() for f in __import__('nbddp._doctor')._doctor.quick()]") == []


def test_too_many_threads(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(env={"OMP_NUM_THREADS": "4096"})
    assert "OMP_NUM_THREADS=4096, for each of 2 ranks, is more than there are" in finding(doctor(kernel), "cores")
    kernel.ok("import os\nos.environ['OMP_NUM_THREADS'] = 'many'")
    assert "OMP_NUM_THREADS=many is no number of threads" in finding(doctor(kernel), "cores")


def test_an_interface_that_is_not_there(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(env={"GLOO_SOCKET_IFNAME": "nope0"})
    text = doctor(kernel)
    line = finding(text, "gloo")
    assert line.startswith("bad gloo GLOO_SOCKET_IFNAME=nope0 names no network interface of this machine, which has lo")
    line = finding(text, "all-reduce")
    assert line.startswith("bad all-reduce gloo, 2 ranks on the CPU: rank ")
    assert "nope0" in line
    assert "It works with --env GLOO_SOCKET_IFNAME=lo: " in line
    assert kernel.get("[f.subject for f in __import__('nbddp._doctor')._doctor.quick()]") == ["gloo"]
    kernel.ok("%%ddp --cpus 2 --env GLOO_SOCKET_IFNAME=lo\n1")


# Rank 1 never comes to the all-reduce.
HANG = "import nbddp._probe as probe\ncell = probe._CELL\nprobe._CELL = cell.replace('total =', {!r})".format(
    "if rank == 1:\n    import time; time.sleep(600)\ntotal ="
)


def test_an_all_reduce_that_hangs(kernel: Kernel) -> None:
    kernel.ok(f"{HANG}\nprobe.DEADLINES['gloo'] = 2.0")
    reply = kernel.ok("%ddp doctor")
    kernel.ok("probe._CELL, probe.DEADLINES['gloo'] = cell, 10.0")
    line = finding(reply.text, "all-reduce")
    assert line.startswith("bad all-reduce gloo, 2 ranks on the CPU: not done at the deadline of 2 s; ")
    assert "rank 0: waiting in all_reduce at torch.distributed.all_reduce(total); rank 1: at import time; " in line
    assert "--env TORCH_CPP_LOG_LEVEL=INFO --timeout 60; %ddp log" in line
    assert reply.text.endswith("nbddp: 1 thing to look at, which would stop a run\n")
    assert reply.seconds < 12
    assert "nothing found" in doctor(kernel)


def test_an_interrupt_ends_it(kernel: Kernel) -> None:
    kernel.ok(f"{HANG}\nprobe.DEADLINES['gloo'] = 300.0")
    reply = kernel.run_and("%ddp doctor", "launcher", threading.Timer(1.0, kernel.interrupt).start)
    kernel.ok("probe._CELL, probe.DEADLINES['gloo'] = cell, 10.0")
    assert reply.error == "KeyboardInterrupt"
    assert "ready after" in finding(reply.text, "launcher")
    assert "nbddp:" not in reply.text
    assert "rank" not in reply.traceback.splitlines()[-1]
    assert reply.seconds < 60
    assert "nothing found" in doctor(kernel)


def test_an_interrupt_ends_a_look_up(silent: Kernel) -> None:
    silent.ok("import nbddp._doctor\nnbddp._doctor._NAME_SECONDS = 60")
    reply = silent.run_and_after("%ddp doctor", 1.5, silent.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert reply.seconds < 20
    assert [child.name() for child in psutil.Process(silent.pid).children() if "-I" in child.cmdline()] == []


def test_a_launcher_that_does_not_answer(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("import nbddp._probe\nnbddp._probe.LAUNCHER_SECONDS = 0.1")
    launcher = next(p for p in psutil.Process(kernel.pid).children() if "nbddp._launcher" in " ".join(p.cmdline()))
    launcher.send_signal(signal.SIGSTOP)
    try:
        text = doctor(kernel)
    finally:
        launcher.send_signal(signal.SIGCONT)
    assert finding(text, "launcher").startswith("bad launcher has not imported torch in 0.1 s; a run would wait for it")
    assert "all-reduce" not in text


def test_a_check_that_fails_says_so_and_the_others_go_on(kernel: Kernel) -> None:
    kernel.ok("import nbddp._checks\nshm, nbddp._checks._SHM = nbddp._checks._SHM, '/no/such'")
    text = doctor(kernel)
    kernel.ok("nbddp._checks._SHM = shm")
    assert finding(text, "/dev/shm").startswith("warn /dev/shm could not be looked at: FileNotFoundError")
    assert finding(text, "all-reduce").startswith("ok")


def test_quick_is_quick(kernel: Kernel) -> None:
    kernel.ok("import nbddp._doctor")
    # A third of a second, but for a machine that is busy.
    assert kernel.ok("found = nbddp._doctor.quick()").seconds < 3
    assert kernel.get("[f.line() for f in found]") == []


def test_a_wrong_sum(kernel: Kernel) -> None:
    kernel.ok(
        "import nbddp._probe as probe\ncell = probe._CELL\nprobe._CELL = cell.replace('rank + 1.0', 'rank + 2.0')"
    )
    line = finding(doctor(kernel), "all-reduce")
    kernel.ok("probe._CELL = '1 / 0'")
    raised = finding(doctor(kernel), "all-reduce")
    kernel.ok("probe._CELL = cell")
    assert re.search(r"CPU: rank [01] raised ZeroDivisionError: division by zero. Run a cell with", raised)
    assert "gloo, 2 ranks on the CPU: a wrong sum in 1048576 of 1048576 elements, and gradients would be wrong" in line


def test_what_the_driver_says(kernel: Kernel) -> None:
    # In nvidia-smi's form; there is no machine with a GPU to record it on. The processes are real.
    gpus = (
        "0, GPU-4b0d2b7a-0000-0000-0000-000000000000, NVIDIA H200, 580.159.03, 143771, 20480\n"
        "1, GPU-4b0d2b7a-0000-0000-0000-000000000001, NVIDIA H200, 580.159.03, 143771, 143156\n"
        "2, GPU-4b0d2b7a-0000-0000-0000-000000000002, NVIDIA H200, 580.159.03, 143771, 4\n"
        "3, GPU-4b0d2b7a-0000-0000-0000-000000000003, NVIDIA H200, 580.159.03, [N/A], [N/A]\n"
    )
    holders = (
        f"GPU-4b0d2b7a-0000-0000-0000-000000000000, {kernel.pid}, /usr/bin/python3, 61440\n"
        f"GPU-4b0d2b7a-0000-0000-0000-000000000000, {os.getpid()}, /usr/bin/python3, 61440\n"
        "GPU-4b0d2b7a-0000-0000-0000-000000000002, 4194305, [Not Found], [N/A]\n"
    )
    found = _gpus.findings(_gpus.parsed(gpus, holders), None)
    assert [(one.level, one.subject) for one in found] == [(level, f"GPU {i}") for i, level in enumerate(LEVELS)]
    assert found[0].text.startswith("NVIDIA H200, 21.5 GB free of 151 GB; held by this notebook's kernel (64.4 GB), ")
    assert f"-m ipykernel_launcher -f (pid {kernel.pid}, 64.4 GB)" in found[0].text
    assert "del its names, then torch.cuda.empty_cache()" in found[0].advice
    assert "held by a process that cannot be seen from here (pid 4194305)" in found[2].text
    assert found[2].advice.startswith("End what is not needed")
    assert "does not say how much" in found[3].text

    # Only those that the notebook may use.
    def shown(visible: str) -> list[str]:
        return [one.subject for one in _gpus.findings(_gpus.parsed(gpus, holders), visible)]

    assert shown("1, 3") == ["GPU 1", "GPU 3"]
    assert shown("GPU-4b0d2b7a-0000-0000-0000-000000000002") == ["GPU 2"]
    assert shown("") == []


LEVELS = ("warn", "ok", "warn", "ok")
