"""What another user of the same machine can do: nothing. Attacks are real, by a process with another uid.

A stranger here knows everything that such a process could find out: every path, every port, every pid.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import json
import os
import pickle
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import nbddp
from nbddp import _paths
from nbddp._paths import RunDir, Session
from tests.kernel import Kernel
from tests.test_lifecycle import launcher_of

PACKAGE = Path(nbddp.__file__).parent
STRANGER = 65534
_CLONE_NEWNET = 0x40000000


def as_stranger(act: Callable[[], Any], *, uid: int = STRANGER, other_network: bool = False) -> Any:
    """Return what `act` returns in a forked process of another user, or in another network namespace."""
    if os.getuid() != 0:
        pytest.skip("NOT TESTED: what another user of the machine can do; becoming one takes root")
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if other_network and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
                os.write(theirs, b'"no namespace"')
                os._exit(0)
            if not other_network:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os.write(theirs, json.dumps(act()).encode())
        except BaseException as error:
            os.write(theirs, json.dumps(f"failed: {error!r}").encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as answer:
        result = json.loads(answer.read())
    os.waitpid(pid, 0)
    assert not str(result).startswith("failed: "), result
    if result == "no namespace":
        pytest.skip("NOT TESTED: access from another network namespace; making one takes more rights than there are")
    return result


@pytest.fixture
def open_temp() -> Iterator[Path]:
    """A temporary directory that everybody can enter, as /tmp is; that of the other tests lies in a private one."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def tree_of(kernel: Kernel) -> list[psutil.Process]:
    """Return the launcher and all below it."""
    launcher = launcher_of(kernel)
    return [launcher, *launcher.children(recursive=True)]


def listening(processes: list[psutil.Process]) -> list[tuple[str, str, int]]:
    """Return the TCP ports that are listened on: the process's name, address, port."""
    return [
        (process.name(), c.laddr.ip, c.laddr.port)
        for process in processes
        for c in process.net_connections()
        if c.status == psutil.CONN_LISTEN
    ]


def read_everything(root: str) -> list[str]:
    """Return what can be listed or read below a folder."""
    found = []
    for folder, folders, files in os.walk(root):
        found += [os.path.join(folder, name) for name in folders]
        for name in files:
            with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb") as file:
                found.append(f"{file.name}: {file.read(20)!r}")
    return found


IDLE = (
    "%%ddp --cpus 2\nimport time\nt = torch.full((1 << 20,), secret)\ndist.all_reduce(t)\nprint('up', flush=True)\n"
    "time.sleep({seconds})\ndist.barrier()\nprint('done')"
)


def attack(
    folders: list[Path], sockets: list[str], processes: list[psutil.Process], ports: list[tuple[str, str, int]]
) -> dict[str, list[str]]:
    """Try everything; return what worked."""
    outcome: dict[str, list[str]] = {
        "files": [found for folder in folders for found in read_everything(str(folder))],
        "sockets": [],
        "processes": [],
        "ports": [],
    }
    for path in sockets:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as one:
            one.connect(path)
            outcome["sockets"].append(path)
    for process in processes:
        for name in ("environ", "mem", "maps", "fd/0", "fd/1", "cwd/."):
            with contextlib.suppress(OSError):
                os.close(os.open(f"/proc/{process.pid}/{name}", os.O_RDONLY))
                outcome["processes"].append(f"{process.pid}: {name}")
        with contextlib.suppress(OSError):
            os.kill(process.pid, 9)
            outcome["processes"].append(f"{process.pid}: killed")
    for _, ip, port in ports:
        with socket.socket() as one:
            one.connect((ip, port))
            one.settimeout(0.3)
            with contextlib.suppress(OSError):
                one.sendall(bytes(64))
                outcome["ports"].append(one.recv(64).hex())
    return outcome


def test_a_stranger_reads_connects_and_signals_nowhere(new_kernel: Callable[..., Kernel], open_temp: Path) -> None:
    kernel = new_kernel(env={"TMPDIR": str(open_temp)})
    kernel.ok("import torch, torch.distributed as dist\nsecret = 42.0\ndata = torch.zeros(1 << 20)")
    seen: dict[str, Any] = {}

    def look() -> None:
        processes = tree_of(kernel)
        (session,) = open_temp.glob("nbddp-*")
        sockets = [str(path) for path in session.rglob("*") if path.is_socket()]
        ports = listening(processes)
        assert sockets
        shm = Path("/dev/shm", session.name)
        assert any(shm.rglob("closure*"))

        seen.update(as_stranger(lambda: attack([session, shm], sockets, processes, ports)))

    reply = kernel.run_and(IDLE.format(seconds=3) + "\nprint(data.sum().item())", "[rank 1] up", look)
    # Connections to gloo's ports are accepted, since it listens; nothing is said to them.
    assert seen == {"files": [], "sockets": [], "processes": [], "ports": []}
    assert "[rank 0] done" in reply.text
    assert reply.status == "ok"


ON_NODES = "%%ddp --engine local --nnodes 2 --cpus 1\n"


def test_on_nodes_a_stranger_reads_connects_and_signals_nowhere(
    new_kernel: Callable[..., Kernel], open_temp: Path
) -> None:
    kernel = new_kernel(env={"TMPDIR": str(open_temp)})
    kernel.ok("import torch, torch.distributed as dist\nsecret = 42.0\ndata = torch.zeros(1 << 20)")
    kernel.ok("import os\nos.environ['TOKEN'] = 'hunter2'")
    seen: dict[str, Any] = {}

    def look() -> None:
        # The gateway, the nodes, and on each a launcher, torchrun's agent, and a rank.
        processes = psutil.Process(kernel.pid).children(recursive=True)
        commands = [" ".join(process.cmdline()) for process in processes]
        assert sum("nbddp._node" in command for command in commands) >= 2
        assert not any(word in command for command in commands for word in ("hunter2", "42.0"))
        sessions = list(open_temp.glob("nbddp-*"))
        assert len(sessions) == 3
        folders = [*sessions, *(Path("/dev/shm", session.name) for session in sessions)]
        sockets = [str(path) for session in sessions for path in session.rglob("*") if path.is_socket()]
        assert len(sockets) >= 3
        ports = listening(processes)
        # gloo's of each rank, and the store, at the one address by which the engine reaches the nodes.
        assert [ip for _, ip, _ in ports] == ["127.0.0.1"] * 3
        seen.update(as_stranger(lambda: attack(folders, sockets, processes, ports)))

    code = IDLE.format(seconds=3).partition("\n")[2] + "\nprint(data.sum().item())"
    reply = kernel.run_and(ON_NODES + code, "rank 1] up", look, timeout=100)
    assert seen == {"files": [], "sockets": [], "processes": [], "ports": []}
    assert reply.status == "ok", reply.traceback
    assert "[node0 rank 0] done" in reply.text


def test_on_nodes_what_a_stranger_puts_into_the_store_is_not_unpickled(kernel: Kernel, tmp_path: Path) -> None:
    """He reaches it, and all that is in it he can change: that can end the run, and do no more."""
    target = tmp_path / "owned"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {target}",)

    from datetime import timedelta

    from torch.distributed import TCPStore

    changed: list[str] = []

    def change(host: str, port: int) -> list[str]:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        keys = [key for key in store.list_keys() if not key.startswith("init/")]
        for key in keys:
            store.set(key, pickle.dumps(Payload()))
        return keys

    def act() -> None:
        host, port = where.read_text().split()
        changed.extend(as_stranger(lambda: change(host, int(port))))

    kernel.ok("import os, time, torch, torch.distributed as dist")
    where = tmp_path / "where"
    kernel.run_and(
        f"{ON_NODES}open({str(where)!r}, 'w').write(os.environ['MASTER_ADDR'] + ' ' + os.environ['MASTER_PORT'])\n"
        "dist.barrier()\nprint('up', flush=True)\ntime.sleep(2)\n"
        "dist.barrier()\ngot = [None, None]\ndist.all_gather_object(got, rank)\ndist.new_group()",
        "rank 1] up",
        act,
        timeout=100,
    )
    # Those of torchrun's agents, and those of the ranks' group.
    assert any("agent" in key for key in changed), changed
    assert any("nbddp" in key for key in changed), changed
    assert not target.exists()
    assert kernel.ok(f"{ON_NODES}print('again')", timeout=100).lines == [f"[node{r} rank {r}] again" for r in range(2)]


def test_the_ports_that_are_listened_on(kernel: Kernel) -> None:
    kernel.ok("import torch.distributed as dist, torch\nsecret = 1.0")
    seen: list[tuple[str, str, int]] = []
    kernel.run_and(
        IDLE.format(seconds=1.5) + "\nimport os; print('port', os.environ['MASTER_PORT'])",
        "[rank 1] up",
        lambda: (time.sleep(0.3), seen.extend(listening(tree_of(kernel)))),
    )
    # gloo's, one for each rank, and torchrun's MASTER_PORT, behind which there is nothing yet.
    assert sorted(name for name, _, _ in seen if name.startswith("nbddp")) == ["nbddp-rank0", "nbddp-rank1"]
    assert len(seen) == 3
    assert {ip for _, ip, _ in seen} == {"127.0.0.1"}


def test_a_store_is_served_to_who_connects(kernel: Kernel) -> None:
    kernel.ok("import torch.distributed as dist, torch, os, subprocess, sys")
    own = (
        "dist.init_process_group('gloo', init_method='env://')\nt = torch.ones(1)\ndist.all_reduce(t)\nprint(t.item())"
    )
    assert kernel.ok(f"%%ddp --cpus 2\n{own}").lines == ["[rank 0] 2.0", "[rank 1] 2.0"]
    # A program that the cell starts knows nothing of nbddp.
    child = "import torch.distributed as dist, torch\n" + own
    reply = kernel.ok(f"%%ddp --cpus 2\nsubprocess.run([sys.executable, '-c', {child!r}], check=True, timeout=50)")
    assert reply.lines == ["[rank 0] 2.0", "[rank 1] 2.0"]
    direct = (
        "store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False)\n"
        "print(store.add('n', 1) in (1, 2))"
    )
    assert kernel.ok(f"%%ddp --cpus 2\n{direct}").lines == ["[rank 0] True", "[rank 1] True"]


def test_connections_of_the_cells_own_are_not_looked_at(kernel: Kernel) -> None:
    """A database, say, that belongs to another user."""
    ours, theirs = os.pipe()
    server = socket.create_server(("127.0.0.1", 0))
    if os.getuid() != 0:
        pytest.skip("NOT TESTED: a server of another user; starting one takes root")
    pid = os.fork()
    if pid == 0:
        # A socket is of who makes it.
        server.close()
        os.setresuid(STRANGER, STRANGER, STRANGER)
        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        server.listen()
        os.write(theirs, str(server.getsockname()[1]).encode())
        held = [server.accept() for _ in range(2)]
        time.sleep(60)
        del held
        os._exit(0)
    port = int(os.read(ours, 10))
    try:
        reply = kernel.run(
            "%%ddp --cpus 2\nimport socket, torch, torch.distributed as dist\nclient = socket.socket()\n"
            f"client.connect(('127.0.0.1', {port}))\ngroup = dist.new_group()\nt = torch.ones(1)\n"
            "dist.all_reduce(t, group=group)\nprint(t.item())"
        )
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        server.close()
        os.close(ours)
        os.close(theirs)
    assert reply.lines == ["[rank 0] 2.0", "[rank 1] 2.0"], reply.traceback


def test_another_network_namespace_sees_nothing(kernel: Kernel) -> None:
    kernel.ok("import torch, torch.distributed as dist\nsecret = 1.0")
    seen: dict[str, Any] = {}

    def look() -> None:
        ports = listening(tree_of(kernel))
        own = {f"/proc/{p.pid}/fd" for p in tree_of(kernel)}
        inodes = {os.readlink(e.path) for folder in own for e in os.scandir(folder)}
        abstract = [
            line
            for line in Path("/proc/net/unix").read_text().splitlines()[1:]
            if f"socket:[{line.split()[6]}]" in inodes and line.rpartition(" ")[2].startswith("@")
        ]
        assert abstract == []

        def attack() -> list[int]:
            reached = []
            for _, ip, port in ports:
                with contextlib.suppress(OSError):
                    with socket.socket() as one:
                        one.connect((ip, port))
                    reached.append(port)
            return reached

        seen["reached"] = as_stranger(attack, other_network=True)
        seen["ports"] = len(ports)

    kernel.run_and(IDLE.format(seconds=2), "[rank 1] up", look)
    assert seen == {"reached": [], "ports": 3}


def test_a_stranger_who_takes_the_place_of_a_rank_is_found_out(
    new_kernel: Callable[..., Kernel], open_temp: Path
) -> None:
    """gloo takes him for rank 1; without the look at whose connection it is he would get what rank 0 sends."""
    kernel = new_kernel()
    kernel.ok("import torch, torch.distributed as dist, time, os")
    heard: list[str] = []
    there = open_temp / "there"

    def attack(ports: list[int]) -> Callable[[], str]:
        def take_the_place() -> str:
            held = []
            for port in ports:
                for sequence in range(8):
                    one = socket.socket()
                    one.connect(("127.0.0.1", port))
                    one.sendall(sequence.to_bytes(8, "little"))
                    one.settimeout(2)
                    held.append(one)
            os.close(os.open(there, os.O_CREAT | os.O_WRONLY))
            got = b""
            deadline = time.monotonic() + 6
            while time.monotonic() < deadline:
                for one in held:
                    one.setblocking(False)
                    with contextlib.suppress(OSError):
                        got += one.recv(4096)
                time.sleep(0.02)
            return got.hex()

        return take_the_place

    def act() -> None:
        deadline = time.monotonic() + 10
        ports: list[int] = []
        while not ports and time.monotonic() < deadline:
            ports = [port for name, _, port in listening(tree_of(kernel)) if name.startswith("nbddp-rank")]
            time.sleep(0.02)
        assert ports
        heard.append(as_stranger(attack(ports)))

    # Rank 0 waits in gloo for a rank 1 that is late.
    reply = kernel.run_and(
        "%%ddp --cpus 2 --no-init --timeout 30\nprint('up', flush=True)\n"
        f"while rank == 1 and not os.path.exists({str(there)!r}):\n    time.sleep(0.05)\n"
        "dist.init_process_group('gloo')\nt = torch.full((512,), 7.0)\ndist.all_reduce(t)\n"
        "print('summed', t[0].item())",
        "[rank 1] up",
        act,
    )
    assert bytes.fromhex("0000e040") not in bytes.fromhex(heard[0])  # 7.0, which rank 0 would have sent
    if "summed" in reply.text:
        pytest.fail("the stranger was not taken for a rank: this test has not tested anything")
    assert reply.status == "error"
    assert "another user's process is at the other end of a connection that this rank's process group" in reply.message
    assert f"uid {STRANGER} at port " in reply.message
    assert reply.error == "StrangerError"


def test_what_a_stranger_puts_into_the_store_is_not_unpickled(kernel: Kernel, tmp_path: Path) -> None:
    """Where a cell asks for it there is a store on a port; in torchrun's own rendezvous this payload would run."""
    target = tmp_path / "owned"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {target}",)

    evil = pickle.dumps(Payload())

    # Now: the import alone takes longer than the cell.
    from torch.distributed import TCPStore

    def attack(port: int) -> None:
        from datetime import timedelta

        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        import base64

        for key in (
            "torch.rendezvous.nbddp",
            "torch.rendezvous.none",
            "nbddp",
            "/",
            "torchelastic/agent/terminal_state",
        ):
            store.set(key, evil)
            store.set(f"{key}.b64", base64.b64encode(evil))

    kernel.ok("import os, torch.distributed as dist")

    port = tmp_path / "port"
    reply = kernel.run_and(
        "%%ddp --cpus 2\nimport time\ndist.init_process_group('gloo', init_method='env://')\n"
        f"open({str(port)!r}, 'w').write(os.environ['MASTER_PORT'])\nprint('up', flush=True)\n"
        "time.sleep(2)\ndist.barrier()\nprint('done')",
        "[rank 1] up",
        lambda: attack(int(port.read_text())),
    )
    assert "[rank 0] done" in reply.text
    assert not target.exists()


def test_only_files_are_unpickled() -> None:
    """Two places unpickle: one reads files of the run directory, the other what a rank gives to its own new process."""
    modules = ("pickle", "_pickle", "cloudpickle", "torch", "marshal", "shelve", "dill", "joblib")
    can_unpickle = {f"{m}.{f}" for m in modules for f in ("load", "loads", "Unpickler", "open")}
    found = []
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (called := ast.unparse(node)) in can_unpickle:
                found.append((path.name, called))
            # Under another name they would not be seen.
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                names = {name.name for name in node.names}
                found += [(path.name, f"from {node.module}")] if names & {"load", "loads", "Unpickler"} else []
            if isinstance(node, ast.Import):
                found += [(path.name, f"as {n.asname}") for n in node.names if n.name in modules and n.asname]
    # _salvage reads what _snapshot reads, with Python's own unpickler in Python.
    # _values looks whether what it has just written itself can be read as plain data.
    expected = [("_snapshot.py", "pickle.loads"), ("_values.py", "torch.load"), ("_workers.py", "cloudpickle.loads")]
    assert sorted(found) == expected
    # What is loaded from memory and not from a file is a literal of the script, or what _salvage has read.
    from_memory = [
        path.name
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and "load" in {name.name for name in node.names}
    ]
    assert sorted(from_memory) == ["_rank.py", "_salvage.py"]


def test_everything_is_private(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport os, __main__\nrun = os.path.dirname(__main__.__file__)\n"
        "for name in (os.path.dirname(run), run, run + '/cell.py', run + '/socket'):\n"
        "    print(oct(os.stat(name).st_mode)[-3:])"
    )
    assert reply.text.split() == ["700", "700", "600", "600"]
    session = kernel.get("__import__('nbddp')._function.client.session.root")
    assert oct(os.stat(session).st_mode)[-3:] == "700"
    shm = Path("/dev/shm", os.path.basename(session))
    assert oct(shm.stat().st_mode)[-3:] == "700"


HOSTILE = "$(touch owned);`touch owned`'\"&|<a> b"


def test_names_and_values_do_not_reach_a_shell(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    folder, temp = tmp_path / HOSTILE, tmp_path / (HOSTILE + "tmp")
    folder.mkdir()
    temp.mkdir()
    (folder / "beside.py").write_text("VALUE = 1\n")
    kernel = new_kernel(
        cwd=str(folder), env={"TMPDIR": str(temp), "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    )
    kernel.ok(f"import beside, shlex, os\nhostile = {HOSTILE!r}\nquoted = shlex.quote(hostile)")
    for options in (
        "--keep-script {quoted}.py",
        "--env X={quoted}",
        "--env {quoted}=1",
        "--backend {quoted}",
        "--gather {quoted}",
    ):
        reply = kernel.run(f"get_ipython().run_cell_magic('ddp', f'--cpus 1 {options}', 'print(beside.VALUE)')")
        assert reply.text.endswith("1\n") or reply.status == "error"
    kernel.run("get_ipython().run_line_magic('ddp', f'log --save {quoted}')")
    assert (
        kernel.ok(
            "%%ddp --cpus 1\nimport os\nprint(os.getcwd() == os.path.realpath(here))".replace("here", repr(str(folder)))
        ).text
        == "True\n"
    )
    names = {path.name for path in tmp_path.rglob("*")}
    assert f"{HOSTILE}.py" in names
    assert "owned" not in names


@pytest.mark.parametrize("how", ["a link", "another's", "open to others"])
def test_a_run_directory_that_is_not_ones_own_is_refused(tmp_path: Path, how: str) -> None:
    root = tmp_path / "run"
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if how == "a link":
        root.symlink_to(tmp_path / "elsewhere")
        why = "it is not a directory"
    elif how == "another's":
        root.mkdir(mode=0o700)
        if os.getuid() != 0:
            pytest.skip("NOT TESTED: a run directory of another user; making one takes root")
        os.chown(root, STRANGER, STRANGER)
        why = f"it belongs to uid {STRANGER}"
    else:
        root.mkdir()
        root.chmod(0o770)
        why = "with mode 770"
    with pytest.raises(PermissionError, match=f"refusing the run directory {root}: .*{why}"):
        RunDir.adopt(str(root))


def test_a_session_directory_that_was_exchanged_is_refused(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernel = new_kernel()
    kernel.ok("%%ddp --cpus 1\npass")
    root = kernel.get("__import__('nbddp')._function.client.session.root")
    os.rename(root, tmp_path / "moved")
    os.symlink(tmp_path / "moved", root)
    reply = kernel.run("%%ddp --cpus 1\nprint('ran')")
    os.unlink(root)
    os.rename(tmp_path / "moved", root)
    assert reply.error == "LaunchError"
    assert reply.message.startswith(f"refusing the session directory {root}: it is not a directory.")
    assert "Restart the kernel" in reply.message
    assert kernel.ok("%%ddp --cpus 1\nprint('ran')").text == "ran\n"


def test_memory_that_somebody_else_has_made_ready_is_not_used(new_kernel: Callable[..., Kernel]) -> None:
    if os.getuid() != 0:
        pytest.skip("NOT TESTED: a directory of another user in /dev/shm; making one takes root")
    kernel = new_kernel()
    kernel.ok("import torch\nx = torch.zeros(1 << 20)")
    shm = Path("/dev/shm", os.path.basename(kernel.get("__import__('nbddp')._function.client.session.root")))
    # As it would be if he had foreseen its name.
    os.chown(shm, STRANGER, STRANGER)
    shm.chmod(0o777)
    reply = kernel.ok(
        "%%ddp --cpus 1 --out x\nx += 1\nimport time; time.sleep(0.5)\nprint(os.listdir(shm))".replace(
            "os.listdir(shm)", f"__import__('os').listdir({str(shm)!r})"
        )
    )
    assert reply.text == "['lock']\n"
    assert kernel.get("x.sum().item()") == 1 << 20
    os.chown(shm, 0, 0)
    shm.chmod(0o700)


def test_what_somebody_else_left_is_not_swept() -> None:
    with _session_of_another() as root:
        assert os.path.basename(root) not in _paths.sweep()
        assert os.path.isdir(root)


@contextlib.contextmanager
def _session_of_another() -> Iterator[str]:
    session = Session()
    if os.getuid() != 0:
        pytest.skip("NOT TESTED: what another user's killed kernel left; making it takes root")
    for path in (session.root, f"/dev/shm/{session.name}"):
        os.chown(path, STRANGER, STRANGER)
    while session._locks:
        os.close(session._locks.pop())
    yield session.root
    session.close()
