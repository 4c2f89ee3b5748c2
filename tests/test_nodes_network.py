"""Runs on machines with addresses of their own: where they meet and listen, and what a cable that is cut does."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster import Namespaces, Place, Slurm, Sshd
from tests.kernel import Kernel, Request
from tests.test_ssh import script

# Nodes load torch for each run.
SECONDS = 90.0

LEASE = 15.0

SLEEP = (
    "import time, os, __main__, torch, torch.distributed as dist\ndist.all_reduce(torch.ones(1))\n"
    "print('begun', os.path.dirname(os.path.dirname(__main__.__file__)), flush=True)\ntime.sleep(600)"
)


@pytest.fixture
def near(namespaces: Namespaces, tmp_path: Path) -> Iterator[Sshd]:
    """Hosts a and b; and "near", the notebook's own machine, as loopback leads to it."""
    folder = tmp_path / "sshd"
    folder.mkdir()
    login = namespaces["login"]
    hosts = {"a": namespaces["a"], "b": namespaces["b"], "near": Place("127.0.0.1", login.host_name, login.prefix)}
    with contextlib.closing(Sshd(folder, hosts)) as sshd:
        yield sshd


def nodes_on(*names: str) -> list[psutil.Process]:
    """Return the processes of runs on nodes."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environ = process.environ()
            ours = environ.get("NBDDP_TEST_RUN") == str(os.getpid()) and environ.get("NBDDP_TEST_NODE") in names
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def listening(process: psutil.Process) -> list[str]:
    """Return the addresses at which a process listens, in whichever network namespace it is."""
    inodes = set()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(entry))
    found = []
    for table, family, size in (("tcp", socket.AF_INET, 4), ("tcp6", socket.AF_INET6, 16)):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = b"".join(raw[i : i + 4][:: 1 if sys.byteorder == "big" else -1] for i in range(0, size, 4))
                found.append(socket.inet_ntop(family, words))
    return found


def begun(kernel: Kernel, line: str) -> Request:
    request = kernel.ask(f"{line}\n{SLEEP}")
    request.follow(lambda reply: reply.text.count("begun") == 2 or reply.error, SECONDS)
    assert not request.reply.error, request.reply.traceback
    return request


def check_where_they_listen(nodes: tuple[str, str]) -> None:
    """One address of each node, by which the others reach it: each rank's gloo, and on the first node the store."""
    found = {name: [a for process in nodes_on(name) for a in listening(process)] for name in nodes}
    assert found == {nodes[0]: ["10.77.0.2"] * 2, nodes[1]: ["10.77.0.3"]}


def check_what_a_cut_does(kernel: Kernel, namespaces: Namespaces, request: Request, nodes: tuple[str, str]) -> None:
    """Both sides end within the lease, each by itself, and leave nothing."""
    folders = [Path(line.split()[-1]) for line in request.reply.lines if "begun" in line]
    assert len(folders) == 2
    assert all(folder.exists() and Path("/dev/shm", folder.name).exists() for folder in folders)
    namespaces.cut("b")
    at = time.monotonic()
    assert request.wait(LEASE + 15.0)
    took = time.monotonic() - at
    assert request.reply.error == "RunLostError"
    assert took < LEASE + 10.0
    deadline = at + LEASE + 15.0
    while (left := nodes_on(*nodes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    for folder in folders:
        assert not folder.exists()
        assert not Path("/dev/shm", folder.name).exists()


HERE = (
    "import socket, torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\n"
    "print(socket.gethostname(), t.item())"
)


def test_over_ssh(namespaces: Namespaces, near: Sshd, new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(command=namespaces["login"].prefix, transport="ipc", env=near.env)
    line = "%%ddp --hosts a,b --cpus 1"
    request = begun(kernel, line)
    try:
        check_where_they_listen(("a", "b"))
        check_what_a_cut_does(kernel, namespaces, request, ("a", "b"))
    finally:
        namespaces.mend("b")
    assert request.reply.message.startswith("node1 (b)"), request.reply.message
    shown = kernel.ok(f"{line}\n{HERE}", timeout=SECONDS)
    assert shown.lines == ["[node0 rank 0] a 2.0", "[node1 rank 1] b 2.0"]


def test_under_slurm(
    namespaces: Namespaces, tmp_path_factory: pytest.TempPathFactory, new_kernel: Callable[..., Kernel]
) -> None:
    places = [namespaces["a"], namespaces["b"]]
    folder = tmp_path_factory.mktemp("net-slurm")
    with contextlib.closing(Slurm(folder, places=places, controller=namespaces["login"])) as slurm:
        kernel = new_kernel(command=namespaces["login"].prefix, transport="ipc", env=slurm.env)
        line = "%%ddp --nnodes 2 --cpus 1"
        request = begun(kernel, line)
        try:
            check_where_they_listen(("a0", "a1"))
            check_what_a_cut_does(kernel, namespaces, request, ("a0", "a1"))
        finally:
            namespaces.mend("b")
        assert request.reply.message.startswith("node1 (a1)"), request.reply.message
        assert not slurm.restore()
        shown = kernel.ok(f"{line}\n{HERE}", timeout=SECONDS)
        assert shown.lines == ["[node0 rank 0] a 2.0", "[node1 rank 1] b 2.0"]
        kernel.close()


def test_a_first_node_that_others_cannot_reach(
    namespaces: Namespaces, near: Sshd, new_kernel: Callable[..., Kernel]
) -> None:
    kernel = new_kernel(command=namespaces["login"].prefix, transport="ipc", env=near.env)
    # By an address that leads, on every machine, to that machine itself.
    reply = kernel.run("%%ddp --hosts near,b --cpus 1\nprint('ran')", timeout=SECONDS)
    assert reply.error == "LaunchError"
    assert reply.message.startswith(
        "no rank could be started: node1 (b): node0 cannot be reached from there at 127.0.0.1:"
    )
    assert "Connection refused. Ranks of all nodes talk to each other" in reply.message
    # Into nowhere, without an answer.
    neighbour = [
        "ip",
        "neigh",
        "replace",
        "10.77.0.2",
        "lladdr",
        "02:00:00:00:00:99",
        "dev",
        "eth0",
        "nud",
        "permanent",
    ]
    subprocess.run([*namespaces["b"].prefix, *neighbour], check=True)
    try:
        reply = kernel.run("%%ddp --hosts a,b --cpus 1\nprint('ran')", timeout=SECONDS)
    finally:
        subprocess.run([*namespaces["b"].prefix, "ip", "neigh", "del", "10.77.0.2", "dev", "eth0"], check=True)
    assert reply.error == "LaunchError"
    assert "node1 (b): node0 cannot be reached from there at 10.77.0.2:" in reply.message
    assert "Connection timed out" in reply.message
    assert reply.seconds < 40


@pytest.mark.parametrize("first", [0, 1])
def test_which_failed_first_does_not_depend_on_the_nodes_clocks(
    new_kernel: Callable[..., Kernel], tmp_path: Path, first: int
) -> None:
    shifted = ["unshare", "--time", "--monotonic=5000", "--fork", "--kill-child"]
    if subprocess.run([*shifted, "true"], check=False, capture_output=True).returncode:
        pytest.skip("NOT TESTED: nodes whose clocks differ; shifting one takes root and a time namespace")
    python = script(
        tmp_path / "python",
        f'for last; do :; done\n[ "$last" = {first}/2 ] && exec {" ".join(shifted)} {sys.executable} "$@"\n'
        f'exec {sys.executable} "$@"',
    )
    kernel = new_kernel()
    failed = tmp_path / "failed"
    # The other fails by itself, a moment later; nobody has had the time to stop it.
    code = (
        "import os, time, torch.distributed as dist\nprint('clock', time.monotonic(), flush=True)\ndist.barrier()\n"
        f"if rank == {first}:\n    open({str(failed)!r}, 'w').close()\n    raise KeyError('first')\n"
        f"while not os.path.exists({str(failed)!r}):\n    pass\ntime.sleep(0.01)\nraise ValueError('second')"
    )
    reply = kernel.run(f"%%ddp --engine local --nnodes 2 --cpus 1 --python {python}\n{code}", timeout=SECONDS)
    early, late = sorted(float(line.split()[-1]) for line in reply.lines if "clock" in line)
    assert late > early + 4000
    assert reply.error == "KeyError", reply.traceback
    assert f"rank {first} of 2 on node{first}" in reply.traceback
    assert f"rank {1 - first}: ValueError: second" in reply.traceback
