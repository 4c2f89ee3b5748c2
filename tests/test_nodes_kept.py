"""Kept ranks on nodes that are processes of this machine: which lines they take, what is said when they are lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbddp import _beginning, _client
from nbddp._devices import Devices, choose, environment, gpus_of
from nbddp._engines import of
from nbddp._errors import LaunchError
from nbddp._options import Options
from nbddp._placement import Nodes, Placement
from tests.kernel import Kernel
from tests.test_engines import processes

SECONDS = 90.0

LOCAL = "--engine local --nnodes 2 --cpus 1"

KEEP = f"%%ddp --keep {LOCAL}\n"


@pytest.fixture(scope="module")
def _kernel(private_folders: Path, open_kernels: list[Kernel]) -> Iterator[Kernel]:
    # What is aborted says where it was.
    kernel = Kernel(env={"PYTHONFAULTHANDLER": "1"})
    open_kernels.append(kernel)
    kernel.ok("%load_ext nbddp\nimport nbddp._kept")
    yield kernel
    kernel.close()
    open_kernels.remove(kernel)


@pytest.fixture
def kernel(_kernel: Kernel) -> Iterator[Kernel]:
    """A kernel of the module's; what it keeps ends after the test."""
    yield _kernel
    _kernel.ok("%config DDPMagics.defaults = ''\n%ddp auto off\n%ddp stop")


def keep(kernel: Kernel, code: str = "held = rank", line: str = KEEP) -> None:
    """Have ranks on two nodes that stay."""
    kernel.ok(line + code, timeout=SECONDS)


def refused(kernel: Kernel, line: str) -> str:
    """Return why kept ranks do not take a line."""
    reply = kernel.run(f"%%ddp --keep {line}\nprint('ran')", timeout=SECONDS)
    assert "ran" not in reply.text
    assert reply.error == "LaunchError"
    return reply.message


def test_which_lines_they_take(kernel: Kernel) -> None:
    keep(kernel)
    there = ["[node0 rank 0] 0", "[node1 rank 1] 1"]
    for line in ("", LOCAL, "--nnodes 2", "--engine local", "--timeout 60"):
        assert kernel.ok(f"%%ddp --keep {line}\nprint(held)").lines == there, line
    assert refused(kernel, f"{LOCAL} --python /usr/bin/other") == (
        "--keep --nnodes 2 --engine local --python /usr/bin/other --cpus 1: 2 ranks are kept, on the CPU, 1 on each of "
        "2 nodes (--engine local). Without --nnodes and --engine and --python and --cpus the cell runs on them; "
        "%ddp stop ends them, with all that they hold"
    )
    for line in (
        "--hosts zz1,zz2",
        "--nnodes 3",
        "--slurm '-p gpu'",
        "--engine slurm",
        "--engine local --cpus 1",
        "--engine local --nnodes 2 --cpus 2",
        "--engine local --nnodes 2 --gpus 1",
        # Without an engine that is Slurm, and this machine.
        "--nnodes 2 --cpus 1",
        "--cpus 1",
        "--cpus 2",
    ):
        assert f"--keep {line}: 2 ranks are kept" in refused(kernel, line).replace(
            "--nnodes 2 --engine local", "--engine local --nnodes 2"
        )
    assert kernel.ok("%%ddp --keep\nprint(held)").lines == there


def test_defaults_that_say_where(kernel: Kernel) -> None:
    kernel.ok("%config DDPMagics.defaults = '--engine local --nnodes 2'")
    keep(kernel, line="%%ddp --keep --cpus 1\n")
    # As it stands it means two nodes again; and what says nothing means whatever is there.
    assert len(kernel.ok("%%ddp --keep --cpus 1\nprint(held)").lines) == 2
    kernel.ok("%config DDPMagics.defaults = '--engine local --nnodes 3 --cpus 4'")
    assert len(kernel.ok("%%ddp --keep\nprint(held)").lines) == 2
    assert "2 ranks are kept" in refused(kernel, "--cpus 1")


def test_auto_goes_on_in_them(kernel: Kernel) -> None:
    kernel.ok(f"%ddp auto on {LOCAL}")
    kernel.ok("held = rank", timeout=SECONDS)
    assert kernel.ok("print(held)").lines[:2] == ["[node0 rank 0] 0", "[node1 rank 1] 1"]


def test_ranks_of_this_machine_take_no_line_for_nodes(kernel: Kernel) -> None:
    kernel.ok("%%ddp --keep --cpus 2\nheld = rank")
    for line in (LOCAL, "--hosts a,b --cpus 1", "--nnodes 2", "--engine local"):
        assert "2 ranks are kept, on the CPU. Without" in refused(kernel, line)
    assert kernel.ok("%%ddp --keep --cpus 2\nprint(held)").lines == ["[rank 0] 0", "[rank 1] 1"]


@pytest.mark.parametrize(
    ("victim", "words"),
    [
        ("_node", "node1 was killed by signal 9 (SIGKILL) (between two cells)"),
        ("_gateway", "nbddp's gateway to the nodes ended between two cells"),
    ],
)
def test_what_ends_them_between_two_cells_is_named(kernel: Kernel, victim: str, words: str) -> None:
    keep(kernel)
    found = processes()[victim]
    next(one for one in found if victim == "_gateway" or one.cmdline()[-1] == "1/2").send_signal(signal.SIGKILL)
    kernel.settles("nbddp._kept.current() is None", value=True, seconds=10)
    reply = kernel.run("%%ddp --keep\nprint(held)")
    assert reply.error == "RunLostError"
    assert reply.message.startswith(words), reply.message


def test_a_rank_that_leaves_between_two_cells_is_named_with_its_node(kernel: Kernel) -> None:
    request = kernel.ask(f"{KEEP}import os, threading\nif rank == 1: threading.Timer(1, os._exit, [3]).start()")
    request.follow(lambda reply: "the kept ranks are gone" in reply.text, SECONDS)
    assert "nbddp: rank 1 on node1 (" in request.reply.text
    assert ") left the process with status 3 between two cells; the kept ranks are gone" in request.reply.text
    assert kernel.run("%%ddp --keep\nprint(held)").error == "RunLostError"


def test_what_nodes_note_between_two_cells_is_shown(kernel: Kernel) -> None:
    request = kernel.ask(f"{KEEP}held = rank")
    assert request.wait(SECONDS)
    kernel.ok("nbddp._kept.current().world.nodes.hear({'kind': 'note', 'text': 'node1 cannot send something'})")
    request.follow(lambda reply: "nbddp: node1 cannot send something" in reply.text)


def test_who_has_not_begun_is_named_once_somebody_has(kernel: Kernel) -> None:
    # Half a minute, from when the first has begun.
    kernel.ok(
        "import os, threading, time\nfrom nbddp._running import running\n"
        "class Slow:\n    def __init__(self): self.n = 1\n"
        "    def __setstate__(self, state):\n        time.sleep(60 if os.environ.get('RANK') == '1' else 0)\n"
        "slow = Slow()\n"
        "def look():\n    while not (running and any(s.in_cell for s in running[0].run.states.values())):\n"
        "        time.sleep(0.1)\n    running[0].run._slow_start_at = 0\n"
        "threading.Thread(target=look, daemon=True).start()"
    )
    reply = kernel.run_and(
        f"%%ddp {LOCAL}\nslow\ntime.sleep(60)", "begun the cell after", kernel.interrupt, timeout=SECONDS
    )
    assert "nbddp: rank 1 has not begun the cell after 30 s. An interrupt says what they are at\n" in reply.text


def test_the_gateways_own_words_are_quoted(kernel: Kernel) -> None:
    sleep = "print('begun', flush=True)\nimport time\ntime.sleep(600)"
    kernel.ok(f"%%ddp {LOCAL} --bg far\n{sleep}")
    kernel.settles("far.log(1).strip() == 'begun' and far.log(0).strip() == 'begun'", value=True, seconds=SECONDS)
    # Another run's has a log of its own.
    kernel.ok(f"%%ddp {LOCAL}\npass", timeout=SECONDS)
    (gateway,) = processes()["_gateway"]
    gateway.send_signal(signal.SIGABRT)
    reply = kernel.run("far.wait()", timeout=SECONDS)
    assert reply.error == "RunLostError"
    assert reply.message == "nbddp's gateway to the nodes ended, and the run with it"
    assert "_gateway.py" in reply.traceback


def test_the_first_agent_that_has_something_to_say_is_quoted() -> None:
    nodes = Nodes(Placement("local", 2, 1))
    for lines in ([], ["no space left"], ["ended"], []):
        nodes.hear({"kind": "agent log", "lines": lines})
    assert nodes.agent_words == ["no space left"]


# GPUs of this machine, shared out among nodes that are its processes.

SPLIT = Options(gpus=2, nnodes=2, engine="local")


@pytest.mark.parametrize(
    ("options", "env", "there", "in_use", "visible"),
    [
        (SPLIT, {}, 8, {}, ("0,1", "2,3")),
        (SPLIT, {"CUDA_VISIBLE_DEVICES": "7,GPU-aa,5,4"}, 4, {}, ("7,GPU-aa", "5,4")),
        (SPLIT, {}, 8, {"1": "one", "4": "one"}, ("0,2", "3,5")),
        (Options(gpus=2, nnodes=2, engine="local", share=True), {}, 8, {"1": "one"}, ("0,1", "2,3")),
        (Options(gpus=3, engine="local"), {}, 4, {}, ("0,1,2",)),
        (Options(gpu_ids=(5, 4, 1, 0), nnodes=2, engine="local"), {}, 8, {}, ("5,4", "1,0")),
    ],
)
def test_gpus_are_shared_out_among_local_nodes(
    options: Options, env: dict[str, str], there: int, in_use: dict[str, str], visible: tuple[str, ...]
) -> None:
    devices = choose(options, env, lambda: there, in_use)
    assert devices.placement is not None
    assert devices.placement.visible == visible
    assert devices.placement.ranks == devices.ranks == sum(len(part.split(",")) for part in visible)
    assert gpus_of(devices, {}) == ",".join(visible).split(",")
    links = of(devices.placement).links(["command"])
    assert [(link.env or {})["CUDA_VISIBLE_DEVICES"] for link in links] == list(visible)
    assert "CUDA_VISIBLE_DEVICES" not in environment({}, options, devices)


@pytest.mark.parametrize(
    ("options", "there", "in_use", "message"),
    [
        (
            SPLIT,
            3,
            {},
            "--gpus 2 on each of --nnodes 2 nodes: there are 3 GPUs here. Ask for --gpus 1, or for",
        ),
        (SPLIT, 1, {}, "--gpus 2 on each of --nnodes 2 nodes: there is 1 GPU here. Ask for --cpus 2 to run on the CPU"),
        (SPLIT, 4, {"3": "one"}, "--gpus 2 on each of --nnodes 2 nodes: GPU 3 is used by one, and 3 more are free"),
        (Options(gpu_ids=(0, 1, 2), nnodes=2, engine="local"), 4, {}, "--gpu-ids 0,1,2: with --engine local these are"),
        (Options(gpu_ids=(0, 1), nnodes=2, engine="local"), 4, {"1": "one"}, "--gpu-ids 0,1: GPU 1 is used by one"),
    ],
)
def test_gpus_that_local_nodes_would_share_are_refused(
    options: Options, there: int, in_use: dict[str, str], message: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        choose(options, {}, lambda: there, in_use)
    assert str(caught.value).startswith(message)


def test_without_gpus_local_nodes_have_the_cpu() -> None:
    devices = choose(SPLIT, {}, lambda: 0)
    assert devices.placement is not None
    assert (devices.ranks, devices.gpus, devices.placement.gpus, devices.placement.visible) == (4, False, False, ())
    assert devices.note == "nbddp: there is no GPU here; 4 ranks on the CPU, over gloo"


def test_gpus_of_other_machines_are_not_counted_here() -> None:
    def count() -> int:
        raise AssertionError

    devices = choose(Options(gpus=2, hosts=("a", "b")), {}, count)
    assert devices == Devices(4, gpus=True, placement=devices.placement)
    assert gpus_of(devices, {}) == []


def test_forks_fail_where_they_have_failed() -> None:
    client = _client.Client()
    a, b = (Placement("ssh", 1, 1, hosts=(host,), job="x") for host in "ab")
    client.cannot_fork.add(a.machines)
    assert client.start_method({}, where=a.machines) == "spawn"
    assert client.start_method({}, where=b.machines) == client.start_method({}) == "fork"
    assert Placement("local", 2, 1).machines is None


@pytest.mark.parametrize(
    ("written", "whole"),
    [
        (b"PATH=/bin\0SECRET=1\0", True),
        (b"PATH=/bin\0DELETED=1\0SECRET=1\0", True),
        (b"", False),
        (bytes(30), False),
        # A title lies over its beginning.
        (b"el: idle\0SECRET=1\0", False),
        (b"title\0\0\0\0SECRET=1\0", False),
        (b"e=title\0SECRET=1\0", False),
    ],
)
def test_an_environment_that_was_written_over_is_not_believed(tmp_path: Path, written: bytes, *, whole: bool) -> None:
    (tmp_path / "environ").write_bytes(written)
    now = {"PATH": "/bin", "SECRET": "1", "SET": "since"}
    began = dict(_beginning._began_with(now, os.fspath(tmp_path / "environ")))
    assert (began == now) != whole
    assert _beginning._began_with(now, os.fspath(tmp_path / "none")) == now
