"""Fixtures: real kernels, and the check that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.cluster import Namespaces, Slurm, Sshd, missing, why_no_slurm
from tests.kernel import Kernel
from tests.leftovers import MARK, leftovers, marked

if TYPE_CHECKING:
    from tests.lab import Lab

# Processes that a test has started may take this long to be gone after it.
_GONE_SECONDS = 8.0


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the tests and their kernels a temporary directory and a home for IPython of their own."""
    root = tmp_path_factory.mktemp("t")
    temp = root / "tmp"
    temp.mkdir()
    patch = pytest.MonkeyPatch()
    patch.setenv("TMPDIR", str(temp))
    patch.setenv("IPYTHONDIR", str(root / "ipython"))
    patch.setenv("JUPYTER_RUNTIME_DIR", str(root / "runtime"))
    patch.setenv(MARK, str(os.getpid()))
    patch.delenv("NBDDP_START_METHOD", raising=False)
    import tempfile

    tempfile.tempdir = None
    yield temp
    patch.undo()
    tempfile.tempdir = None


@pytest.fixture(scope="session")
def open_kernels() -> Iterator[list[Kernel]]:
    """Every kernel that is still open."""
    kernels: list[Kernel] = []
    yield kernels
    for kernel in kernels:
        kernel.close()


@pytest.fixture(scope="session")
def _shared_kernel(private_folders: Path, open_kernels: list[Kernel]) -> Kernel:
    kernel = Kernel()
    open_kernels.append(kernel)
    kernel.ok("%load_ext nbddp")
    return kernel


@pytest.fixture
def kernel(_shared_kernel: Kernel) -> Iterator[Kernel]:
    """A kernel with the extension loaded and an otherwise empty namespace; shared: starting one takes a second."""
    yield _shared_kernel
    if _shared_kernel.alive():
        _shared_kernel.ok("%reset -f\nimport os as _os\n_os.chdir(_os.environ['TMPDIR'])\ndel _os")


@pytest.fixture
def new_kernel(open_kernels: list[Kernel]) -> Iterator[Callable[..., Kernel]]:
    """Start kernels of a test's own; they are killed at its end, which must leave nothing either."""
    own: list[Kernel] = []

    def start(load: bool = True, **options: object) -> Kernel:
        kernel = Kernel(**options)  # type: ignore[arg-type]
        own.append(kernel)
        open_kernels.append(kernel)
        if load:
            kernel.ok("%load_ext nbddp")
        return kernel

    yield start
    for kernel in own:
        kernel.close(politely=kernel.ends_politely)
        open_kernels.remove(kernel)


@pytest.fixture(scope="module")
def _module_lab(private_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    # Of a module, not of the session: while a browser is open, asyncio refuses to run another loop in this thread.
    from tests.lab import BROWSERS, Lab, browser_path

    browser = browser_path()
    if browser is None:
        pytest.skip(f"NOT TESTED: nbddp in JupyterLab; that takes a browser on PATH, one of {', '.join(BROWSERS)}")
    lab = Lab(tmp_path_factory.mktemp("lab"), browser)
    yield lab
    lab.close()


@pytest.fixture
def lab(_module_lab: Lab) -> Iterator[Lab]:
    """JupyterLab in a browser; starting it takes seconds, so that a module's tests share it, and its page."""
    yield _module_lab
    _module_lab.close_notebooks()


def need(what: str, *commands: str) -> None:
    """Skip where there are no such commands."""
    if lacking := missing(*commands):
        pytest.skip(f"NOT TESTED: {what}; that takes {', '.join(lacking)}, which `make cluster` installs as root")


def need_slurm() -> None:
    """Skip where no Slurm can be started."""
    if why := why_no_slurm():
        pytest.skip(f"NOT TESTED: runs under Slurm; {why}")


@pytest.fixture(scope="module")
def _module_slurm(private_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need_slurm()
    slurm = Slurm(tmp_path_factory.mktemp("slurm"), gpus=2)
    yield slurm
    slurm.close()


@pytest.fixture
def slurm(_module_slurm: Slurm) -> Iterator[Slurm]:
    """A real Slurm of two nodes; what a test kills there is started again, and no job may be left."""
    yield _module_slurm
    left = _module_slurm.restore()
    assert not left, f"jobs left behind: {left}"


@pytest.fixture(scope="module")
def _module_sshd(private_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    need("runs over ssh", "sshd", "ssh", "ssh-keygen", "setpriv")
    sshd = Sshd(tmp_path_factory.mktemp("sshd"))
    tried = subprocess.run(sshd.command("a", "true"), capture_output=True, text=True, check=False, timeout=60)
    if tried.returncode:
        log = (sshd.folder / "a.log").read_text()
        sshd.close()
        pytest.skip(f"NOT TESTED: runs over ssh; sshd does not let this user in: {tried.stderr.strip()}\n{log}")
    yield sshd
    sshd.close()


@pytest.fixture
def sshd(_module_sshd: Sshd) -> Iterator[Sshd]:
    """Two real hosts, a and b; what a test kills there is started again, and no connection may be left."""
    yield _module_sshd
    left = _module_sshd.restore()
    assert not left, f"connections left behind: {left}"


@pytest.fixture(scope="module")
def namespaces(private_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespaces]:
    """Three machines, login, a and b, with addresses of their own."""
    need("machines with addresses of their own", "ip", "unshare", "nsenter", "setpriv")
    try:
        made = Namespaces(tmp_path_factory.mktemp("net"))
    except (ChildProcessError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT TESTED: machines with addresses of their own; making them takes root: {error}")
    yield made
    made.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a full disk; mounting one takes root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def left_behind(private_folders: Path, open_kernels: list[Kernel]) -> Callable[[], list[str]]:
    """Return what there is at the moment that should not be there."""
    return lambda: leftovers(private_folders, open_kernels)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, private_folders: Path, open_kernels: list[Kernel]) -> Iterator[None]:
    """After every test: no process, file, socket or changed environment but those of kernels that are still open."""
    environment = _environment()
    yield
    deadline = time.monotonic() + _GONE_SECONDS
    while (left := leftovers(private_folders, open_kernels)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        # The next test must not suffer for this one.
        for process in marked():
            with contextlib.suppress(psutil.Error):
                if "nbddp._launcher" not in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
        for line in left:
            if line.startswith((str(private_folders), "/dev/shm/")):
                shutil.rmtree(line, ignore_errors=True)
    assert not left, f"left behind by {request.node.name}:\n" + "\n".join(left)
    assert _environment() == environment


def _environment() -> dict[str, str]:
    # The second is set by torch, when the first optimizer in a process is made.
    return {k: v for k, v in os.environ.items() if k not in ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end, where it is read, what this machine could not test."""
    reasons = {
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    }
    if untested := sorted(reason for reason in reasons if reason.startswith("NOT TESTED")):
        terminalreporter.section("not tested on this machine", yellow=True, bold=True)
        for reason in untested:
            terminalreporter.line(reason, yellow=True)
