"""The clusters that other tests use: each part does what it is for, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster import Namespaces, Slurm, Sshd
from tests.kernel import Kernel

SECONDS = 20.0

# A task that srun starts with --export=NONE has no PATH.
SETSID = "/usr/bin/setsid"
QUIET = "> /dev/null 2>&1 < /dev/null"


def until(holds: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ran(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=SECONDS
    )


@contextlib.contextmanager
def started(command: list[str], env: dict[str, str | None] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a command while a block runs, and kill it with its children: srun has one that outlives it."""
    full = {key: value for key, value in {**os.environ, **(env or {})}.items() if value is not None}
    process = subprocess.Popen(command, env=full, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children():
                child.kill()
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    return False


def killed(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    until(lambda: not runs(process))


def found_and_killed(command: str, left_behind: Callable[[], list[str]]) -> None:
    until(lambda: len(left_behind()) == 1)  # the shell that has started it may take a moment to go
    (left,) = left_behind()
    assert command in left
    killed(int(left.split()[1].rstrip(":")))


def test_a_job_runs_on_both_nodes_with_their_gpus(slurm: Slurm) -> None:
    shown = slurm.run("srun", "-N2", "--gpus-per-node=2", "sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")
    assert sorted(shown.stdout.splitlines()) == ["a0 0,1", "a1 0,1"]


def test_a_kernel_has_srun(slurm: Slurm, new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(env=slurm.env)
    assert kernel.ok("!srun -N2 printenv SLURMD_NODENAME").lines == ["a0", "a1"]


def test_jobs_are_listed(slurm: Slurm) -> None:
    # A job that is cancelled before its tasks have started takes seconds to end.
    with started(["srun", "-N2", "--job-name=mine", "sh", "-c", "echo started; exec sleep 60"], slurm.env) as srun:
        assert [first_line(srun), first_line(srun)] == ["started"] * 2
        (job,) = slurm.squeue()
        assert (job["name"], job["state"], job["nodes"]) == ("mine", "RUNNING", "a[0-1]")
        assert slurm.states() == {"a0": "mixed", "a1": "mixed"}
        slurm.run("scancel", job["id"])
        until(lambda: not slurm.squeue())


@pytest.mark.parametrize("export", ["ALL", "NONE"])
def test_what_a_task_leaves_is_found(slurm: Slurm, left_behind: Callable[[], list[str]], export: str) -> None:
    slurm.run("srun", "-w", "a1", f"--export={export}", "/bin/sh", "-c", f"{SETSID} sleep 61 {QUIET} &")
    found_and_killed("sleep 61", left_behind)


def test_a_dead_node_leaves_its_tasks_and_comes_back(slurm: Slurm) -> None:
    with started(["srun", "-w", "a1", "sh", "-c", "echo $$; exec sleep 62"], slurm.env) as srun:
        task = psutil.Process(int(first_line(srun)))
        slurm.kill_node("a1")
        assert task.is_running()
        assert task.parent().name() != "slurmstepd"
    slurm.restart_node("a1")
    slurm.run("scancel", *(job["id"] for job in slurm.squeue()))  # nobody has told Slurm that it is over
    slurm.wait_idle()
    assert task.is_running()
    killed(task.pid)
    assert slurm.run("srun", "-w", "a1", "printenv", "SLURMD_NODENAME").stdout == "a1\n"


def test_a_dead_controller_comes_back_with_its_jobs(slurm: Slurm) -> None:
    with started(["srun", "sh", "-c", "echo started; exec sleep 63"], slurm.env) as srun:
        assert first_line(srun) == "started"
        slurm.kill_controller(politely=True)
        slurm.restart_controller()
        assert [job["state"] for job in slurm.squeue()] == ["RUNNING"]
        slurm.run("scancel", "--user=root" if os.getuid() == 0 else f"--user={os.getuid()}")


def test_ssh_reaches_both_hosts(sshd: Sshd) -> None:
    for name, address in (("a", "127.0.0.1"), ("b", "127.0.0.2")):
        shown = ran(sshd.command(name, 'echo "$NBDDP_TEST_NODE" $SSH_CONNECTION'))
        assert shown.returncode == 0, shown.stderr
        node, _, _, to, _ = shown.stdout.split()
        assert (node, to) == (name, address)


def test_a_login_inherits_nothing(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_TEST", "1")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    names = {line.partition("=")[0] for line in ran(sshd.command("a", "env")).stdout.splitlines()}
    assert {"HOME", "PATH", "SSH_CONNECTION", "NBDDP_TEST_RUN"} <= names
    assert not names & {"LC_TEST", "PYTHONPATH", "VIRTUAL_ENV", "PYTEST_CURRENT_TEST"}
    assert len(names) < 20


def test_a_login_may_be_noisy(sshd: Sshd) -> None:
    (sshd.home / ".bashrc").write_text("echo welcome\n")
    (sshd.home / ".profile").write_text("echo welcome\n")
    shown = ran(sshd.command("a", "sh -lc true; true")).stdout
    (sshd.home / ".bashrc").unlink()
    (sshd.home / ".profile").unlink()
    assert shown.startswith("welcome\n")


def test_a_kernel_has_ssh(sshd: Sshd, new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(env=sshd.env)
    assert kernel.ok("!ssh b printenv NBDDP_TEST_NODE").text.split() == ["b"]


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("changed", "REMOTE HOST IDENTIFICATION HAS CHANGED"),
        ("stranger", "Host key verification failed"),
        ("password", "Permission denied (publickey,password)"),
        ("dead", "Connection refused"),
        ("silent", "Connection timed out during banner exchange"),
    ],
)
def test_hosts_with_which_it_does_not_work(sshd: Sshd, host: str, words: str) -> None:
    command, *rest = sshd.command(host, "true")
    shown = ran([command, "-o", "BatchMode=yes", "-o", "ConnectTimeout=1", *rest])
    assert shown.returncode == 255
    assert words in shown.stderr


def test_what_a_login_leaves_is_found(sshd: Sshd, left_behind: Callable[[], list[str]]) -> None:
    assert ran(sshd.command("b", f"{SETSID} sleep 64 {QUIET} &")).returncode == 0
    found_and_killed("sleep 64", left_behind)


@pytest.mark.parametrize("how", ["drop", "kill_host"])
def test_connections_end_and_what_runs_lives_on(sshd: Sshd, how: str) -> None:
    with started(sshd.command("a", "echo $$; exec sleep 65")) as ssh:
        task = psutil.Process(int(first_line(ssh)))
        assert sshd.sessions("a")
        assert not sshd.sessions("b")
        getattr(sshd, how)("a")
        assert ssh.wait(SECONDS) == 255
        assert task.is_running()
        killed(task.pid)
    alive = ran(sshd.command("a", "true")).returncode == 0
    assert alive == (how == "drop")
    if not alive:
        sshd.restart_host("a")
        assert ran(sshd.command("a", "true")).returncode == 0


def test_machines_with_addresses_of_their_own(namespaces: Namespaces) -> None:
    for name, address in (("login", "10.77.0.1"), ("a", "10.77.0.2"), ("b", "10.77.0.3")):
        prefix = namespaces[name].prefix
        assert namespaces[name].address == address
        shown = ran(
            [*prefix, "sh", "-c", "hostname; getent hosts $(hostname); getent hosts a; ip -4 -br address"]
        ).stdout
        assert shown.split()[:3] == [name, "127.0.1.1", name]
        assert f"{address}/24" in shown
        assert ran([*prefix, "ip", "route", "show", "default"]).stdout == ""


@pytest.mark.usefixtures("sshd")
def test_ssh_between_machines_until_the_cable_is_cut(namespaces: Namespaces, tmp_path: Path) -> None:
    folder = tmp_path / "sshd"
    folder.mkdir()
    with contextlib.closing(Sshd(folder, {name: namespaces[name] for name in ("a", "b")})) as sshd:

        def ask(name: str) -> subprocess.CompletedProcess[str]:
            command, *rest = sshd.command(name, "hostname; echo $SSH_CONNECTION")
            return ran([*namespaces["login"].prefix, command, "-o", "ConnectTimeout=1", *rest])

        assert ask("a").stdout.split()[::3] == ["a", "10.77.0.2"]
        assert ask("b").stdout.split()[::3] == ["b", "10.77.0.3"]
        namespaces.cut("b")
        assert ask("b").returncode == 255
        assert ask("a").returncode == 0
        namespaces.mend("b")
        until(lambda: ask("b").returncode == 0)


@pytest.mark.usefixtures("slurm")
def test_slurm_between_machines(namespaces: Namespaces, tmp_path_factory: pytest.TempPathFactory) -> None:
    places = [namespaces["a"], namespaces["b"]]
    folder = tmp_path_factory.mktemp("net-slurm")
    with contextlib.closing(Slurm(folder, places=places, controller=namespaces["login"])) as slurm:
        assert sorted(slurm.run("srun", "-N2", "hostname").stdout.split()) == ["a", "b"]


def test_a_kernel_on_another_machine(namespaces: Namespaces, new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(command=namespaces["login"].prefix, transport="ipc")
    assert kernel.get("__import__('socket').gethostname()") == "login"


def listening(ports: set[int]) -> set[str]:
    """Return the addresses at which somebody listens at one of these ports."""
    return {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port in ports}


@pytest.mark.usefixtures("sshd")
def test_several_at_once_and_nothing_is_left(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> None:
    children = set(psutil.Process().children())
    folders = [tmp_path_factory.mktemp(name) for name in ("three", "ssh")]
    other = Slurm(folders[0], 3)
    sshd = Sshd(folders[1])
    ports = {*other.ports.values(), *sshd.ports.values()}
    assert all(address.startswith("127.") for address in listening(ports))
    with (
        started(["srun", "-N3", "--no-kill", "sh", "-c", "echo $$; exec sleep 66"], other.env) as srun,
        started(sshd.command("a", "echo $$; exec sleep 67")) as ssh,
    ):
        tasks = [psutil.Process(int(first_line(process))) for process in (srun, srun, srun, ssh)]
        daemons = [daemon for task in tasks for daemon in task.parents()[:-1]]  # slurmstepd, and sshd's
        assert {"slurmstepd", "sshd"} <= {daemon.name() for daemon in daemons}
        assert other.states().keys() == {"a0", "a1", "a2"}
        other.close()
        sshd.close()
    assert set(psutil.Process().children()) == children
    until(lambda: not any(map(runs, {*tasks, *daemons} - set(psutil.Process().parents()) - {psutil.Process()})), 5)
    assert not any(folder.exists() for folder in folders)
    assert not listening(ports)
    assert slurm.states() == {"a0": "idle", "a1": "idle"}
