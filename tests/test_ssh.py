"""Runs over ssh: hosts that cannot be reached, shells that are not bash, environments that differ, links that break."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import nbddp
from nbddp._option_line import parse
from nbddp._options import OptionError
from nbddp._placement import Placement
from nbddp._ssh import Ssh
from tests.cluster import Sshd
from tests.kernel import Kernel

# Nodes load torch for each run.
SECONDS = 90.0

SLEEP = "import time\nprint('begun', flush=True)\ntime.sleep(600)"

ODD = "a b'c\"d$HOME`id`;ü"


@pytest.fixture(scope="module")
def _kernel(_module_sshd: Sshd, private_folders: Path, open_kernels: list[Kernel]) -> Iterator[Kernel]:
    # A secret of the notebook's machine, and what would lead astray on another.
    env = {"SECRET_HERE": "hunter2", "LD_LIBRARY_PATH": "/nowhere/here", **_module_sshd.env}
    kernel = Kernel(env=env)
    open_kernels.append(kernel)
    kernel.ok("%load_ext nbddp")
    yield kernel
    kernel.close()
    open_kernels.remove(kernel)


@pytest.fixture
def kernel(_kernel: Kernel, sshd: Sshd) -> Kernel:
    """A kernel of the module's, which reaches hosts a and b over ssh."""
    return _kernel


def run(kernel: Kernel, line: str, code: str):  # type: ignore[no-untyped-def]  # a Reply
    """Run a cell that may fail."""
    return kernel.run(f"%%ddp {line}\n{code}", timeout=SECONDS)


def works(kernel: Kernel, line: str = "--hosts a,b --cpus 1", code: str = "print('here')") -> list[str]:
    """Run a cell that must not fail; return its lines."""
    return kernel.ok(f"%%ddp {line}\n{code}", timeout=SECONDS).lines


def script(path: Path, text: str) -> Path:
    """Write a program."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def logging_in(sshd: Sshd, command: str) -> Iterator[None]:
    """Have whoever logs in get a command of the hosts' instead of the shell that runs his own."""
    keys = sshd.folder / "authorized_keys"
    before = keys.read_text()
    escaped = command.replace('"', '\\"')
    keys.write_text(f'command="{escaped}" {before}')
    try:
        yield
    finally:
        keys.write_text(before)


@contextlib.contextmanager
def configured(sshd: Sshd, *lines: str) -> Iterator[None]:
    """Have the user's own configuration begin with these lines."""
    before = sshd.config.read_text()
    sshd.config.write_text("\n".join([*lines, before]))
    try:
        yield
    finally:
        sshd.config.write_text(before)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("changed", "the host key of changed is not the one that ssh knows, or it knows none"),
        (
            "stranger",
            "See that it is the right machine, with 'ssh stranger' in a terminal, which also remembers its key",
        ),
        ("password", "password does not let ssh in without a password (publickey,password); a notebook cannot answer"),
        ("dead", "dead cannot be reached. It said: ssh: connect to host 127.0.0.1"),
        ("no-such.invalid", "no-such.invalid cannot be reached. It said: ssh: Could not resolve hostname"),
    ],
)
def test_a_host_that_cannot_be_reached(kernel: Kernel, sshd: Sshd, host: str, words: str) -> None:
    reply = run(kernel, f"--hosts a,{host} --cpus 1", "print('ran')")
    assert reply.error == "LaunchError"
    assert reply.message.startswith(f"no rank could be started: node1 ({host}): ")
    assert words in reply.message
    assert "ran" not in reply.text
    assert reply.seconds < 20
    # What was begun on the other is ended when the cell is.
    assert gone("a")


def test_a_host_that_never_says_a_word(kernel: Kernel) -> None:
    reply = run(kernel, "--hosts silent,a --cpus 1", "print('ran')")
    assert "node0 (silent): silent cannot be reached" in reply.message
    assert "timed out" in reply.message
    assert 10 < reply.seconds < 25


@pytest.mark.parametrize(
    "hosts",
    ["-oProxyCommand=touch${IFS}owned,b", "a,-F/etc/passwd", "a,--", "a,b;touch owned", "a,$(touch owned)", "a b`id`"],
)
def test_a_host_is_no_option_and_no_command(kernel: Kernel, hosts: str) -> None:
    with pytest.raises(OptionError, match="--hosts"):
        parse(f"--cpus 1 --hosts={shlex.quote(hosts)}")
    reply = kernel.run(f"%%ddp --cpus 1 --hosts={shlex.quote(hosts)}\nprint('ran')")
    assert reply.text.startswith("UsageError: --hosts ")


def nodes_on(host: str) -> list[psutil.Process]:
    """Return the processes of runs on a host."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environ = process.environ()
            ours = environ.get("NBDDP_TEST_RUN") == str(os.getpid()) and environ.get("NBDDP_TEST_NODE") == host
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def gone(host: str, seconds: float = 5.0) -> bool:
    """Tell whether no process of a run is left on a host: one that has just begun there sees the end in a moment."""
    deadline = time.monotonic() + seconds
    while nodes_on(host) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not nodes_on(host)


def clients(kernel: Kernel) -> dict[str, psutil.Process]:
    """Return the ssh clients of a kernel's gateway, by host."""
    below = psutil.Process(kernel.pid).children(recursive=True)
    found = [process for process in below if process.name() == "ssh"]
    return {process.cmdline()[process.cmdline().index("--") + 1]: process for process in found}


# Every shell that there is, and what is passed on by it.

SHELLS = ("sh", "bash", "dash", "zsh", "csh", "tcsh", "fish", "ksh")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_is_the_same_for_every_shell(shell: str, tmp_path: Path) -> None:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"NOT TESTED: nodes whose login shell is {shell}, which is not installed")
    # csh takes "!" for its history whatever stands around it.
    folder = tmp_path / ODD / f"50% *?[x]{{a,b}}~#&|<>{'' if 'csh' in shell else '!'}"
    folder.mkdir(parents=True)
    python = script(folder / "python", "printf '%s\\n' \"$@\"; ps -o comm= -p $PPID")
    engine = Ssh(Placement("ssh", 1, 1, hosts=("a",), python=str(python)))
    remote = engine.links([str(python), "-P", "-m", "nbddp._node", "ssh"])[0].argv[-1]
    shown = subprocess.run(
        [path, "-c", remote],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    *words, parent = shown.stdout.splitlines()
    assert words == ["-P", "-m", "nbddp._node", "ssh", "0"], shown
    # Nothing stands between sshd and the node which would have to be ended, too.
    assert parent != shell


def test_shells_that_greet_and_folders_with_odd_names(kernel: Kernel, sshd: Sshd, tmp_path: Path) -> None:
    """On a, a csh that is noisy; on b, bash with a start-up file that does not end its line; HOME, TMPDIR are odd."""
    temp, home = (tmp_path / f"{name} {ODD}" for name in ("tmp", "home"))
    for folder in (temp, home):
        folder.mkdir()
    # What it leaves running goes on printing, and holds the connection open.
    left = "while sleep 0.2; do echo 'and again'; done &\necho $! > \"$HOME/left\"\n"
    (home / ".bashrc").write_text(f"{left}printf 'Welcome to the cluster'\necho 'and mind the gap' >&2\n")
    (home / ".cshrc").write_text("echo 'Welcome to csh'\n")
    hidden = tmp_path / "hidden"
    (hidden / "here").mkdir(parents=True)
    script(tmp_path / "greeting", '. "$HOME/.bashrc"\neval "$SSH_ORIGINAL_COMMAND"')
    own = script(
        tmp_path / "login",
        f"export HOME={shlex.quote(str(home))} TMPDIR={shlex.quote(str(temp))} LC_ALL=C\n"
        f'[ $NBDDP_TEST_NODE = a ] && exec {shutil.which("csh") or "bash"} -c "$SSH_ORIGINAL_COMMAND"\n'
        # The notebook's folder is not there.
        f"mount -t tmpfs none {hidden} || exit 99\n"
        f"exec bash {tmp_path}/greeting",
    )
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("NOT TESTED: a node without the notebook's folder; hiding one takes root")
    kernel.ok(f"import os\nos.chdir({str(hidden / 'here')!r})\nx = {ODD!r}")
    try:
        with logging_in(sshd, f"exec unshare --mount {own}"):
            code = (
                f"import os, __main__\nprint(os.getcwd(), x == {ODD!r}, "
                f"__main__.__file__.startswith({str(temp)!r}), os.path.expanduser('~') == {str(home)!r})\n"
                f"made = {ODD!r}"
            )
            reply = kernel.ok(f"%%ddp --hosts a,b --cpus 1 --gather made\n{code}", timeout=SECONDS)
    finally:
        kernel.ok("os.chdir(os.environ['TMPDIR'])")
        os.kill(int((home / "left").read_text()), signal.SIGKILL)
    assert [line for line in reply.lines if line.startswith("[")] == [
        f"[node0 rank 0] {hidden}/here True True True",
        f"[node1 rank 1] {home} True True True",
    ], reply.text
    assert f"nbddp: node1 (b) has no folder {hidden}/here; its ranks run in {home}" in reply.text
    assert "node0 (a) has no folder" not in reply.text
    assert kernel.get("made") == [ODD] * 2
    assert list(temp.iterdir()) == []


def test_what_the_notebook_has_set_goes_along_and_nothing_else(kernel: Kernel, sshd: Sshd, tmp_path: Path) -> None:
    """By way of what the user's own configuration has: an alias, a jump, a shared connection, a command of its own."""
    kernel.ok("import os\nos.environ['SET_IN_NOTEBOOK'] = 'a \"b\" $c\\nü'")
    address, port = sshd.hosts["b"].address, sshd.ports["b"]
    socket_path = sshd.folder / "mux"
    key, known = sshd.folder / "key", sshd.folder / "known_hosts"
    lines = [
        "Host jumped",
        f"  HostName {address}\n  Port {port}\n  ProxyJump a\n  IdentityFile {key}\n  UserKnownHostsFile {known}",
        "  RemoteCommand tmux attach\n  RequestTTY yes\n  ForwardAgent yes\n  LocalForward 1 localhost:1",
        "Host a",
        f"  ControlPath {socket_path}\n  ControlMaster auto\n  ControlPersist 60",
    ]
    with configured(sshd, *lines):
        subprocess.run(["ssh", "-F", str(sshd.config), "-fN", "a"], check=True, timeout=20, stderr=subprocess.DEVNULL)
        try:
            code = (
                "import os, json, subprocess\nprint(json.dumps(dict(os.environ)), flush=True)\n"
                # What looks like a node's own words is a rank's words all the same.
                "os.write(1, b'@0 5 .SnsiIn0=\\n')\nos.write(2, b'@1 0 .!!\\n')\n"
                "subprocess.run(['echo', '@0 6 .SnsiIn0='], check=True)"
            )
            shown = works(kernel, "--hosts a,jumped --cpus 1 --env GIVEN='x y' --env EMPTY=", code)
            # The user's own connection is as it was.
            subprocess.run(["ssh", "-F", str(sshd.config), "-O", "check", "a"], check=True, stderr=subprocess.DEVNULL)
        finally:
            subprocess.run(["ssh", "-F", str(sshd.config), "-O", "exit", "a"], check=True, stderr=subprocess.DEVNULL)
            kernel.ok("del os.environ['SET_IN_NOTEBOOK']")
    assert sorted(line for line in shown if "@" in line and "{" not in line) == [
        f"[node{n} rank {n}] {words}" for n in range(2) for words in ("@0 5 .SnsiIn0=", "@0 6 .SnsiIn0=", "@1 0 .!!")
    ]
    shown = [line for line in shown if "{" in line]
    assert len(shown) == 2
    for line in shown:
        env = json.loads(line.partition("] ")[2])
        assert env["SET_IN_NOTEBOOK"] == 'a "b" $c\nü'
        assert (env["GIVEN"], env["EMPTY"]) == ("x y", "")
        assert not {"SECRET_HERE", "LD_LIBRARY_PATH", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"} & set(env)
        assert "hunter2" not in line
        assert str(sshd.folder / "bin") not in env["PATH"]
        assert env["HOME"] == str(sshd.home)
        assert "SSH_AUTH_SOCK" not in env


# What is there, or is not, on one of two nodes: by an interpreter that is not the same on both.

PACKAGE = Path(nbddp.__file__).parent


def other_on_b(tmp_path: Path, command: str) -> Path:
    """Return an interpreter that is this one on a, and a command on b."""
    text = f'[ $NBDDP_TEST_NODE = b ] && {{ {command}\n}}\nexec {shlex.quote(sys.executable)} "$@"'
    return script(tmp_path / "python", text)


def test_there_is_no_interpreter_on_one_node(kernel: Kernel, sshd: Sshd, tmp_path: Path) -> None:
    reply = run(kernel, f"--hosts a,b --cpus 1 --python {tmp_path}/no/python", "print('ran')")
    assert (
        f": there is no {tmp_path}/no/python there. The notebook's interpreter is taken unless --python"
        in reply.message
    )
    python = other_on_b(tmp_path, 'exec /no/such/python "$@"')
    reply = run(kernel, f"--hosts a,b --cpus 1 --python {python}", "print('ran')")
    assert reply.message.startswith(f"no rank could be started: node1 (b): there is no {python} there.")
    # csh has a status of its own for that.
    if csh := shutil.which("csh"):
        with logging_in(sshd, f'exec {csh} -c "$SSH_ORIGINAL_COMMAND"'):
            reply = run(kernel, f"--hosts a,b --cpus 1 --python {tmp_path}/no/python", "print('ran')")
        assert f": there is no {tmp_path}/no/python there." in reply.message
    assert gone("a")


def test_there_is_no_package_on_one_node(kernel: Kernel, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = other_on_b(tmp_path, f'exec {shlex.quote(str(bare))}/bin/python "$@"')
    reply = run(kernel, f"--hosts a,b --cpus 1 --python {python}", "print('ran')")
    assert reply.message == (
        f"no rank could be started: node1 (b): {python} has no nbddp there. Install the notebook's version into that "
        "environment, on every node"
    )


@pytest.mark.parametrize("package", ["nbddp", "torch", "no torch"])
def test_another_version_on_one_node(kernel: Kernel, tmp_path: Path, package: str) -> None:
    site = tmp_path / "site"
    if package == "nbddp":
        shutil.copytree(PACKAGE, site / "nbddp")
        init = site / "nbddp" / "__init__.py"
        init.write_text(init.read_text().replace(nbddp.__version__, "0.0.1"))
        words = f"it has nbddp 0.0.1, and the notebook {nbddp.__version__} ("
    else:
        (site / "torch-1.13.1.dist-info").mkdir(parents=True)
        version = "1.13.1" if package == "torch" else ""
        (site / "torch-1.13.1.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        words = "it has torch 1.13.1, and the notebook 2." if version else " has no torch"
    python = other_on_b(tmp_path, f"export PYTHONPATH={shlex.quote(str(site))}")
    reply = run(kernel, f"--hosts a,b --cpus 1 --python {python}", "print('ran')")
    assert reply.message.startswith("no rank could be started: node1 (b): ")
    assert words in reply.message
    assert gone("a")


def other_pythons() -> dict[tuple[int, int], str]:
    """Return interpreters of other releases, where there are any."""
    found = {}
    for minor in range(7, 16):
        for path in (
            shutil.which(f"python3.{minor}"),
            *map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")),
        ):
            if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
                found[3, minor] = path
    found.pop(sys.version_info[:2], None)
    return found


@pytest.mark.parametrize("old", [True, False])
def test_another_python_on_one_node(kernel: Kernel, tmp_path: Path, old: bool) -> None:
    fitting = [path for release, path in sorted(other_pythons().items()) if (release < (3, 11)) == old]
    if not fitting:
        pytest.skip(f"NOT TESTED: a node with {'an older' if old else 'another'} Python; there is none on this machine")
    python = other_on_b(tmp_path, f'export PYTHONPATH={PACKAGE.parent}\nexec {shlex.quote(fitting[0])} "$@"')
    reply = run(kernel, f"--hosts a,b --cpus 1 --python {python}", "print('ran')")
    assert reply.message.startswith("no rank could be started: node1 (b): ")
    assert "--python PATH names another interpreter" in reply.message
    assert ("is a Python there that is older than 3.11" if old else "it has Python 3.") in reply.message


def test_a_full_disk_on_one_node(kernel: Kernel, sshd: Sshd, tmp_path: Path, small_disk: Path) -> None:
    python = other_on_b(tmp_path, f"export TMPDIR={shlex.quote(str(small_disk))}")
    # Room for a folder and a log, and not for the cell.
    (small_disk / "filler").write_bytes(bytes(32 << 10))
    reply = run(kernel, f"--hosts a,b --cpus 1 --python {python}", f"print('ran')\n# {'x' * 40_000}")
    assert reply.message.startswith("no rank could be started: node1 (b): ")
    assert "No space left on device" in reply.message or "no room for" in reply.message
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


# Links that break in the middle of a run.


def begun(kernel: Kernel):  # type: ignore[no-untyped-def]  # a Request
    """Return a cell that runs on both hosts."""
    request = kernel.ask(f"%%ddp --hosts a,b --cpus 1\n{SLEEP}")
    request.follow(lambda reply: reply.text.count("begun") == 2, SECONDS)
    return request


@pytest.mark.parametrize("fault", ["its sshd is killed", "the connection is dropped", "the client is killed"])
def test_a_link_that_breaks_ends_the_run_and_the_next_works(kernel: Kernel, sshd: Sshd, fault: str) -> None:
    request = begun(kernel)
    if fault == "its sshd is killed":
        sshd.kill_host("b")
    elif fault == "the connection is dropped":
        sshd.drop("b")
    else:
        clients(kernel)["b"].send_signal(signal.SIGKILL)
    at = time.monotonic()
    assert request.wait(20.0)
    assert time.monotonic() - at < 6.0
    assert request.reply.error == "RunLostError"
    said = (
        "the ssh client that leads to b was killed by signal 9" if "client" in fault else "the connection to b was lost"
    )
    assert request.reply.message.startswith(f"node1 (b): {said}")
    deadline = time.monotonic() + 6.0
    while (left := nodes_on("a") + nodes_on("b")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    sshd.restore()
    assert works(kernel) == [f"[node{n} rank {n}] here" for n in range(2)]


def test_a_shell_that_waits_for_something_is_told_and_can_be_interrupted(kernel: Kernel, sshd: Sshd) -> None:
    fifo = sshd.folder / "fifo"
    os.mkfifo(fifo)
    (sshd.home / ".bashrc").write_text(f"[ $NBDDP_TEST_NODE = b ] && read something < {fifo}\n")
    try:
        request = kernel.ask("%%ddp --hosts a,b --cpus 1\nprint('ran')")
        request.follow(lambda reply: any("waits for node1 (b)" in p["text/plain"] for p in reply.panels), 30.0)
        kernel.interrupt()
        assert request.wait(20.0)
        assert request.reply.error == "KeyboardInterrupt"
        assert [process.name() for process in nodes_on("b")] == ["bash"]
    finally:
        (sshd.home / ".bashrc").unlink()
        # What it waits for comes; and the node that begins so late finds that nobody wants it any more.
        fifo.write_text("something\n")
        fifo.unlink()
