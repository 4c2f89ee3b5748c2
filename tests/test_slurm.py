"""Runs under a real Slurm: what can be had, how it begins, what can end it, and that nothing is left then."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster import Slurm
from tests.conftest import need_slurm
from tests.kernel import Kernel, Reply, Request
from tests.node_rounds import Plan, series

SECONDS = 90.0

SLEEP = "import time\nprint('begun', flush=True)\ntime.sleep(600)"

CONF = (
    "PreemptType=preempt/partition_prio",
    "PreemptMode=CANCEL",
    "PartitionName=short Nodes=ALL MaxTime=1",
    "PartitionName=high Nodes=ALL PriorityTier=10",
)

ROUNDS = 2


@pytest.fixture(scope="module")
def _cluster(private_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need_slurm()
    slurm = Slurm(tmp_path_factory.mktemp("slurm"), 3, gpus=2, conf=CONF)
    yield slurm
    slurm.close()


@pytest.fixture
def slurm(_cluster: Slurm) -> Iterator[Slurm]:
    """Three nodes; no job may be left on them."""
    yield _cluster
    left = _cluster.restore()
    assert not left, f"jobs left behind: {left}"


@pytest.fixture(scope="module")
def _kernel(_cluster: Slurm, open_kernels: list[Kernel]) -> Iterator[Kernel]:
    kernel = Kernel(env=_cluster.env)
    open_kernels.append(kernel)
    kernel.ok("%load_ext nbddp\n%config DDPMagics.grace = 2")
    yield kernel
    kernel.close()
    open_kernels.remove(kernel)


@pytest.fixture
def kernel(slurm: Slurm, _kernel: Kernel) -> Kernel:
    """A kernel of the module's, which has srun."""
    return _kernel


def env_of(slurm: Slurm) -> dict[str, str]:
    return {key: value for key, value in {**os.environ, **slurm.env}.items() if value is not None}


@contextlib.contextmanager
def held(slurm: Slurm, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Hold all nodes with another job while a block runs."""
    with subprocess.Popen(
        ["srun", "--quiet", "-N3", "--exclusive", "--job-name=other", *options, "sleep", "600"],
        env=env_of(slurm),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as srun:
        try:
            until(lambda: [job["state"] for job in slurm.squeue()] == ["RUNNING"])
            yield srun
        finally:
            srun.terminate()


def until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def own_jobs(slurm: Slurm) -> list[dict[str, str]]:
    return [job for job in slurm.squeue() if job["name"].startswith("nbddp-")]


def states(reply: Reply) -> str:
    return "\n".join(panel["text/plain"] for panel in reply.panels)


def ended(request: Request, seconds: float = SECONDS) -> Reply:
    assert request.wait(seconds), request.reply.outputs
    return request.reply


def begun(kernel: Kernel, options: str, ranks: int, code: str = SLEEP) -> Request:
    request = kernel.ask(f"%%ddp {options}\n{code}")
    request.follow(lambda reply: reply.text.count("begun") == ranks or reply.error, SECONDS)
    assert not request.reply.error, request.reply.traceback
    return request


# What can be had.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--nnodes 4 --cpus 1", ["--nnodes 4", "the default partition has 3 nodes (a0, a1, a2)"]),
        ("--nnodes 2 --cpus 64", ["64 ranks on a node", "the most is 2", "--cpus-per-task=2"]),
        ("--nnodes 2 --gpus 8", ["--gpus 8 on 2 nodes", "the most is 2"]),
        ("--nnodes 2 --cpus 1 --slurm '-p nosuch'", ["invalid partition specified: nosuch", "srun --job-name"]),
        ("--nnodes 2 --cpus 1 --slurm '-c 1 --mem=1T'", ["--mem=1T"]),
        ("--nnodes 2 --cpus 1 --slurm '-c 1 --gres=tpu:1'", ["generic resource"]),
        ("--nnodes 2 --cpus 1 --slurm '-c 1 --constraint=a100'", ["Invalid feature"]),
        ("--nnodes 2 --cpus 1 --slurm '-c 1 --no-such-option'", ["unrecognized option '--no-such-option'"]),
        ("--nnodes 2 --cpus 1 --slurm '-p short --time=60'", ["for ever: PartitionTimeLimit"]),
        ("--nnodes 2 --cpus 1 --slurm '-N 3'", ["--slurm -N: --nnodes says how many nodes"]),
        ("--nnodes 2 --cpus 1 --slurm '-c 1 --output=/tmp/x'", ["--slurm --output", "%ddp log"]),
        ("--nnodes 2 --cpus 1 --slurm '--exclusive=user gpu'", ["'gpu' is no option"]),
    ],
)
def test_what_can_never_be_had_is_refused(kernel: Kernel, options: str, words: list[str]) -> None:
    reply = kernel.run(f"%%ddp {options}\n1")
    assert reply.error == "LaunchError", reply.traceback
    for word in words:
        assert word in reply.message
    assert reply.seconds < 10.0


def test_nodes_that_are_down_are_named(kernel: Kernel, slurm: Slurm) -> None:
    slurm.run("scontrol", "update", "NodeName=a1,a2", "State=DRAIN", "Reason=new memory")
    try:
        reply = kernel.run("%%ddp --nnodes 2 --cpus 1\n1")
    finally:
        slurm.run("scontrol", "update", "NodeName=a1,a2", "State=RESUME")
    assert "a1 is drained (new memory), a2 is drained" in reply.message


def test_without_srun(kernel: Kernel) -> None:
    kernel.ok("import os\npath = os.environ['PATH']\nos.environ['PATH'] = '/nowhere'")
    reply = kernel.run("%%ddp --nnodes 2 --cpus 1 --engine slurm\n1")
    kernel.ok("os.environ['PATH'] = path")
    assert "no srun on PATH" in reply.message


def test_without_a_controller(kernel: Kernel, slurm: Slurm) -> None:
    slurm.kill_controller(politely=True)
    reply = kernel.run("%%ddp --nnodes 2 --cpus 1\n1")
    assert reply.error == "LaunchError"
    assert "Slurm's controller does not answer" in reply.message
    assert "is DOWN" in reply.message
    assert reply.seconds < 10.0


def test_asking_a_controller_that_hangs_is_broken_off(kernel: Kernel, slurm: Slurm) -> None:
    controller = psutil.Process(int((slurm.folder / "slurmctld.pid").read_text()))
    controller.suspend()
    try:
        request = kernel.ask("%%ddp --nnodes 2 --cpus 1\n1")
        request.follow(lambda reply: "asks Slurm for 2 nodes" in states(reply))
        pressed = time.monotonic()
        kernel.interrupt()
        reply = ended(request)
        took = time.monotonic() - pressed
    finally:
        controller.resume()
    assert reply.error == "KeyboardInterrupt"
    assert took < 5.0


# The queue.


def test_waiting_is_shown_with_its_reason_and_an_interrupt_takes_the_job_back(kernel: Kernel, slurm: Slurm) -> None:
    with held(slurm):
        request = kernel.ask("%%ddp --nnodes 2 --cpus 1\n1")
        request.follow(lambda reply: "waits in the queue (Resources)" in states(reply))
        (job,) = own_jobs(slurm)
        assert f"Slurm's job {job['id']} waits in the queue" in states(request.reply)
        pressed = time.monotonic()
        kernel.interrupt()
        reply = ended(request)
        assert time.monotonic() - pressed < 4.0
        assert not own_jobs(slurm)
    assert reply.error == "KeyboardInterrupt"
    assert "no rank had started" in reply.traceback


def test_what_has_waited_runs_when_its_turn_comes(kernel: Kernel, slurm: Slurm) -> None:
    with held(slurm):
        request = kernel.ask("%%ddp --nnodes 2 --cpus 1\nprint('at last')")
        request.follow(lambda reply: "waits in the queue" in states(reply))
    assert ended(request).lines == ["[node0 rank 0] at last", "[node1 rank 1] at last"]
    assert "begins" in states(request.reply)


def test_a_job_that_is_cancelled_in_the_queue(kernel: Kernel, slurm: Slurm) -> None:
    with held(slurm):
        request = kernel.ask("%%ddp --nnodes 2 --cpus 1\n1")
        until(lambda: own_jobs(slurm))
        slurm.run("scancel", own_jobs(slurm)[0]["id"])
        assert "was cancelled while it waited in the queue" in ended(request).message


@pytest.mark.parametrize("victims", [["kernel"], ["gateway"], ["kernel", "gateway"]])
def test_whoever_is_killed_no_job_stays_in_the_queue(
    slurm: Slurm, new_kernel: Callable[..., Kernel], victims: list[str]
) -> None:
    kernel = new_kernel(env=slurm.env)
    with held(slurm):
        kernel.ask("%%ddp --nnodes 2 --cpus 1\n1")
        until(lambda: own_jobs(slurm))
        processes = psutil.Process(kernel.pid).children(recursive=True)
        pids = {
            "kernel": kernel.pid,
            "gateway": next(one.pid for one in processes if "nbddp._gateway" in " ".join(one.cmdline())),
        }
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        until(lambda: not own_jobs(slurm), 5.0)


# GPUs.


def test_gpus_are_asked_for_and_nodes_without_run_on_their_cpus(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --nnodes 2 --gpus 2\nimport os\nprint(os.environ['CUDA_VISIBLE_DEVICES'], device)", timeout=SECONDS
    )
    assert "there is no GPU on 2 nodes; 4 ranks on the CPU, over gloo" in reply.text
    assert sum(line.endswith("] 0,1 cpu") for line in reply.lines) == 4


def test_what_the_user_asks_for_wins(kernel: Kernel) -> None:
    code = "import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('SLURM_CPUS_PER_TASK'))"
    reply = kernel.ok(f"%%ddp --nnodes 2 --gpus 2 --slurm '--gres=gpu:1 -c 1'\n{code}", timeout=SECONDS)
    assert sum(line.endswith("] 0 1") for line in reply.lines) == 4


# In a job.


@pytest.fixture
def in_a_job(slurm: Slurm, new_kernel: Callable[..., Kernel]) -> Iterator[Kernel]:
    """A kernel in a step of a job of two nodes, as JupyterHub starts it; the step has all CPUs of its node."""
    asked = ["-N2", "-n2", "-c2", "--mem=500", "--gres=gpu:2"]
    kernel = new_kernel(
        load=False, env=slurm.env, command=["salloc", "--quiet", *asked, "srun", "-N1", "-n1", "--mem=500", "--quiet"]
    )
    kernel.pid = kernel.get("__import__('os').getpid()")
    kernel.ok("%load_ext nbddp\n%config DDPMagics.grace = 2")
    yield kernel
    # A server would interrupt it first, and salloc with it.
    kernel.client.shutdown()
    until(lambda: not kernel.alive())


def test_a_notebook_in_a_job_uses_that_and_ends_no_more_than_its_steps(in_a_job: Kernel, slurm: Slurm) -> None:
    kernel = in_a_job
    (job,) = slurm.squeue()
    assert kernel.get(
        "[os.environ['SLURM_NTASKS'], os.environ['SLURM_CPUS_PER_TASK']]".replace("os", "__import__('os')")
    )

    code = (
        "import os\nprint(os.environ['SLURM_JOB_ID'], os.environ['CUDA_VISIBLE_DEVICES'], len(os.sched_getaffinity(0)))"
    )
    reply = kernel.ok(f"%%ddp --nnodes 2 --cpus 1\n{code}", timeout=SECONDS)
    cpus = len(os.sched_getaffinity(0))
    assert reply.lines == [f"[node{rank} rank {rank}] {job['id']} 0,1 {cpus}" for rank in range(2)]

    request = begun(kernel, "--nnodes 2 --cpus 1", 2)
    os.kill(kernel.pid, signal.SIGINT)
    assert ended(request, 20.0).error == "KeyboardInterrupt"

    refused = kernel.run("%%ddp --nnodes 3 --cpus 1\n1")
    assert f"Slurm's job {job['id']}, which has 2 nodes" in refused.message

    request = begun(kernel, "--nnodes 2 --cpus 1", 2)
    gateway = next(
        one for one in psutil.Process(kernel.pid).children(True) if "nbddp._gateway" in " ".join(one.cmdline())
    )
    gateway.kill()
    assert ended(request, 20.0).error == "RunLostError"
    steps = lambda: slurm.run("squeue", "--steps", "--noheader", "--format=%i %j").stdout  # noqa: E731
    until(lambda: "nbddp-" not in steps())
    assert [(one["id"], one["state"]) for one in slurm.squeue()] == [(job["id"], "RUNNING")]
    assert kernel.get("1 + 1") == 2


# What can end a run.


def test_its_end_from_outside_is_told(kernel: Kernel, slurm: Slurm) -> None:
    for what, words in (
        ("job", "was cancelled from outside (scancel)"),
        ("step", "was cancelled from outside (scancel)"),
        ("preempted", "to make room for another job (preemption)"),
        ("time", "its time limit was reached. --slurm '--time=...' asks for more"),
    ):
        request = begun(kernel, "--nnodes 2 --cpus 1", 2)
        (job,) = own_jobs(slurm)
        match what:
            case "job":
                slurm.run("scancel", job["id"])
            case "step":
                slurm.run("scancel", f"{job['id']}.0")
            case "preempted":
                # It begins when the other is gone.
                slurm.run("srun", "-p", "high", "-N3", "--exclusive", "true", timeout=SECONDS)
            case "time":
                # Limits are looked at every half minute.
                slurm.run("scontrol", "update", f"JobId={job['id']}", "EndTime=now+1")
        reply = ended(request)
        assert reply.error == "RunLostError"
        assert words in reply.message, what


def test_a_node_that_fails_is_named(kernel: Kernel, slurm: Slurm) -> None:
    request = begun(kernel, "--nnodes 2 --cpus 1", 2)
    slurm.kill_node("a1")
    reply = ended(request, 40.0)
    assert reply.error == "RunLostError"
    assert "node1 (a1)" in reply.message


@pytest.fixture
def own_slurm(private_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of a test's own: after its controller's death it is a minute until all is settled."""
    need_slurm()
    slurm = Slurm(tmp_path_factory.mktemp("own"))
    yield slurm
    slurm.close()


def test_a_run_outlives_slurms_controller(own_slurm: Slurm, new_kernel: Callable[..., Kernel]) -> None:
    slurm, kernel = own_slurm, new_kernel(env=own_slurm.env)
    code = (
        "import os, time\nprint('begun', flush=True)\nwhile not os.path.exists(go): time.sleep(0.05)\nmade = rank + 1"
    )
    go = slurm.folder / "go"
    kernel.ok(f"go = {str(go)!r}")
    request = begun(kernel, "--nnodes 2 --cpus 1 --gather made", 2, code)
    (job,) = own_jobs(slurm)
    slurm.kill_controller()
    go.touch()
    reply = ended(request, 40.0)
    assert reply.status == "ok", reply.traceback
    assert kernel.get("made") == [1, 2]
    assert f"Slurm does not answer, and may go on holding the nodes: scancel --name={job['name']}" in reply.text


# What is on the nodes.


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_that_is_not_there(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --nnodes 2 --cpus 1 --python /no/such/python\n1", timeout=SECONDS)
    assert reply.error == "LaunchError"
    assert "there is no /no/such/python there" in reply.message
    assert "a0" in reply.message or "a1" in reply.message
    assert "--python PATH" in reply.message


def test_an_interpreter_without_nbddp(kernel: Kernel, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    reply = kernel.run(f"%%ddp --nnodes 2 --cpus 1 --python {python}\n1", timeout=SECONDS)
    assert f"{python} has no nbddp there. Install" in reply.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("import nbddp; nbddp.__version__ = '0.0.1'", "it has nbddp 0.0.1, and the notebook"),
        ("import platform; platform.python_version = lambda: '3.99.0'", "it has Python 3.99.0, and the notebook"),
        ("import importlib.metadata as m; m.version = lambda _: '1.13.1'", "it has torch 1.13.1, and the notebook"),
    ],
)
def test_an_interpreter_with_other_versions(kernel: Kernel, tmp_path: Path, change: str, words: str) -> None:
    start = f"{change}\nimport runpy, sys\nsys.argv = sys.argv[3:]\n"
    start += "runpy.run_module('nbddp._node', run_name='__main__', alter_sys=True)"
    (tmp_path / "start.py").write_text(start)
    # Only on one of the two.
    other = f'[ "$SLURMD_NODENAME" = a0 ] && exec {sys.executable} "$@"; exec {sys.executable} {tmp_path}/start.py "$@"'
    python = script(tmp_path / "python", other)
    reply = kernel.run(f"%%ddp --nnodes 2 --cpus 1 --python {python}\n1", timeout=SECONDS)
    assert reply.error == "LaunchError"
    assert f"node1 (a1): {words}" in reply.message


def test_a_full_disk_on_one_node(kernel: Kernel, tmp_path: Path, small_disk: Path) -> None:
    full = f'[ "$SLURMD_NODENAME" = a1 ] && export TMPDIR={small_disk}; exec {sys.executable} "$@"'
    python = script(tmp_path / "python", full)
    # Not to the last page: a folder that holds no file at all is not taken.
    with contextlib.suppress(OSError), (small_disk / "full").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(small_disk / "full", (small_disk / "full").stat().st_size - 8192)
    code = f"text = {'x' * 20000!r}\n1"
    reply = kernel.run(f"%%ddp --nnodes 2 --cpus 1 --python {python}\n{code}", timeout=SECONDS)
    assert reply.error in ("LaunchError", "RunLostError")
    assert "node1 (a1)" in reply.message
    assert "no space left" in reply.message.lower()
    assert str(small_disk) in reply.message
    assert [path.name for path in small_disk.iterdir()] == ["full"]


def test_a_folder_that_is_not_there(slurm: Slurm, new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    away = 'mount -t tmpfs none "$0" && mkdir "$0/work" && cd "$0/work" && exec "$@"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", away, str(tmp_path)]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: a folder that is not on the nodes; mounting one takes root")
    kernel = new_kernel(env=slurm.env, command=command)
    reply = kernel.ok("%%ddp --nnodes 2 --cpus 1\nimport os\nprint(os.getcwd())", timeout=SECONDS)
    assert f"has no folder {tmp_path}/work; its ranks run in {os.path.expanduser('~')}" in reply.text
    assert sum(line.endswith(f"] {os.path.expanduser('~')}") for line in reply.lines) == 2


def test_three_nodes_by_their_names(kernel: Kernel) -> None:
    code = "import time, torch.distributed as dist\ntime.sleep(2.5)\n"
    code += "if rank == 2:\n    raise ValueError('no')\ndist.barrier()"
    reply = kernel.run(f"%%ddp --nnodes 3 --cpus 1\n{code}", timeout=SECONDS)
    assert reply.error == "ValueError"
    assert "rank 2 of 3 on node2 (a2)" in reply.traceback
    assert all(f"node{number} (a{number})" in states(reply) for number in range(3))


# All at random.


@pytest.mark.slow
def test_whatever_is_hit_nothing_is_left_and_the_next_cell_works(
    slurm: Slurm, private_folders: Path, open_kernels: list[Kernel]
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    rounds = series(private_folders, slurm, open_kernels)
    try:
        results = [rounds.play(Plan.draw(seed, number)) for number in range(ROUNDS)]
    finally:
        rounds.close()
    failed = [
        f"python benchmarks/nodes.py rounds --seed {seed} --only {result.plan.number}\n{result}"
        for result in results
        if result.problems
    ]
    assert not failed, "\n".join(failed)


def test_a_round_is_drawn_from_its_seed_and_number_alone() -> None:
    assert Plan.draw(7, 3) == Plan.draw(7, 3)
    assert len({Plan.draw(7, number) for number in range(100)}) == 100
