"""Loading, unloading, the launcher's life, and what must never be left or opened."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import nbddp
from nbddp import _paths, _process
from nbddp._paths import RunDir, Session, sweep
from tests.kernel import LINKS, Kernel

PACKAGE = Path(nbddp.__file__).parent

SHELL_STATE = (
    LINKS
    + r"""
import gc, os, re, signal, sys, threading, atexit
def descriptors():
    # IPython's history comes and goes.
    kept = [link for link in links() if "sqlite" not in link and "profile_" not in link]
    return sorted(re.sub(r"\d+", "", link) for link in kept)
def shell_state():
    ip = get_ipython()
    return {
        "line": sorted(ip.magics_manager.magics["line"]),
        "cell": sorted(ip.magics_manager.magics["cell"]),
        "registry": sorted(ip.magics_manager.registry),
        "transformers": [str(f) for f in ip.input_transformers_cleanup],
        "completers": sorted(ip.strdispatchers["complete_command"].strs),
        "configurables": len(ip.configurables),
        "events": {k: len(v) for k, v in ip.events.callbacks.items()},
        "handlers": [str(signal.getsignal(s)) for s in (2, 15, 17)],
        "threads": threading.active_count(),
        "environment": dict(os.environ),
        "descriptors": descriptors(),
        "names": sorted(n for n in ip.user_ns if not n.startswith("_") and n != "state"),
    }
"""
)


def test_load_unload_load_leaves_the_shell_as_it_was(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(load=False)
    kernel.ok("import nbddp._loading\n%load_ext storemagic")  # what stays imported; IPython's own magics are lazy
    kernel.ok(SHELL_STATE)
    kernel.ok("state = [shell_state()]")
    for _ in range(2):
        kernel.ok("%load_ext nbddp")
        assert kernel.ok("%%ddp --cpus 1\nprint('fine')").text == "fine\n"
        kernel.ok("%unload_ext nbddp")
        kernel.ok("state.append(shell_state())")
    assert (
        kernel.get(
            "state[0] == state[1] == state[2] or [k for k in state[0] if not state[0][k] == state[1][k] == state[2][k]]"
        )
        is True
    )
    assert "not found" in kernel.run("%%ddp --cpus 1\npass").text
    kernel.ok("%load_ext nbddp")
    kernel.ok("%reload_ext nbddp")
    assert kernel.ok("%%ddp --cpus 1\nprint('again')").text == "again\n"


def test_loading_returns_at_once(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(load=False)
    assert kernel.ok("%load_ext nbddp").seconds < 0.5
    assert kernel.get("'torch' in __import__('sys').modules") is False


def test_importing_nbddp_imports_neither_torch_nor_ipython() -> None:
    heavy = ("torch", "IPython", "numpy", "cloudpickle", "argparse")
    code = f"import sys, nbddp; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_rendezvous_module_is_light() -> None:
    # Every torchrun on the machine imports it.
    own = "[m for m in sys.modules if m.startswith('nbddp')]"
    code = f"import sys, nbddp._rendezvous; print('torch' in sys.modules, len({own}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False 4\n"


def test_what_the_script_imports_is_light() -> None:
    # So does every worker process that a rank spawns.
    code = "import sys, nbddp._rank; print([m for m in ('torch', 'IPython', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_public_names() -> None:
    assert nbddp.__all__ == sorted(nbddp.__all__)
    for name in nbddp.__all__:
        assert getattr(nbddp, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nbddp.nothing


def launcher_of(kernel: Kernel) -> psutil.Process:
    return next(p for p in psutil.Process(kernel.pid).children() if "nbddp._launcher" in " ".join(p.cmdline()))


def test_the_idle_launcher_has_one_thread_and_has_imported_what_ranks_need(kernel: Kernel) -> None:
    kernel.ok("%%ddp --cpus 1\npass")
    deadline = time.monotonic() + 20
    text = ""
    while "dynamo" not in text and time.monotonic() < deadline:
        text = kernel.ok(
            "%%ddp --cpus 1\nimport sys\nprint(*[m for m in ('torch._dynamo', 'stack_data') if m in sys.modules])"
        ).text
    assert text == "torch._dynamo stack_data\n"
    assert launcher_of(kernel).num_threads() == 1


def test_the_launcher_does_not_grow(kernel: Kernel) -> None:
    for _ in range(3):
        kernel.ok("%%ddp --cpus 2\npass")
    launcher = launcher_of(kernel)
    time.sleep(0.5)
    before = launcher.num_fds(), launcher.memory_info().rss
    for _ in range(30):
        kernel.ok("%%ddp --cpus 2\npass")
    deadline = time.monotonic() + 5
    while (launcher.children() or launcher.num_fds() != before[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert launcher.num_fds() == before[0]
    assert launcher.memory_info().rss - before[1] < 5e6


def test_the_kernel_does_not_grow(kernel: Kernel) -> None:
    kernel.ok(SHELL_STATE)
    kernel.ok("for _ in range(3): get_ipython().run_cell_magic('ddp', '--cpus 1', 'pass')")
    before = kernel.get("descriptors()")
    kernel.ok("for _ in range(20): get_ipython().run_cell_magic('ddp', '--cpus 1', 'pass')")
    assert kernel.get("descriptors()") == before


def test_a_killed_launcher_is_replaced(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("%%ddp --cpus 1\npass")
    launcher_of(kernel).kill()
    assert kernel.ok("%%ddp --cpus 1\nprint('fine')").text == "fine\n"


def test_a_kernel_killed_while_the_launcher_imports(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\nwhile True:\n    time.sleep(0.01)")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    kernel = new_kernel(env={"PYTHONPATH": path})
    time.sleep(1)
    process = launcher_of(kernel)
    kernel.kill()
    process.wait(timeout=2)


def test_a_kernel_killed_while_it_waits_for_the_launcher_to_end(
    new_kernel: Callable[..., Kernel], private_folders: Path, tmp_path: Path
) -> None:
    # The launcher imports this one in the background.
    (tmp_path / "mpmath.py").write_text(
        f"import time\nopen({str(tmp_path / 'importing')!r}, 'w').close()\ntime.sleep(4)"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    kernel = new_kernel(env={"PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while not (tmp_path / "importing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kernel.ask("%unload_ext nbddp")
    time.sleep(1)
    kernel.kill()
    deadline = time.monotonic() + 10
    while left := list(private_folders.glob(f"nbddp-{kernel.pid}-*")):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_restarted_kernel_starts_afresh(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.client.execute("%%ddp --cpus 2\nimport time\ntime.sleep(100)")
    deadline = time.monotonic() + 20
    while len(processes := psutil.Process(kernel.pid).children(recursive=True)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kernel._manager.restart_kernel(now=True)
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive


def test_a_launcher_that_cannot_import_torch_says_so(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')")
    kernel = new_kernel(env={"PYTHONPATH": str(tmp_path)})
    kernel.ends_politely = True
    for _ in range(2):
        reply = kernel.run("%%ddp --cpus 1\nprint(1)")
        assert reply.error == "LaunchError"
        assert "libfoo.so.1" in reply.traceback


def test_a_broken_package_that_torch_would_like_does_no_harm(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    (tmp_path / "mpmath.py").write_text("raise AttributeError('broken')")
    kernel = new_kernel(env={"PYTHONPATH": str(tmp_path)})
    for _ in range(2):
        assert kernel.ok("%%ddp --cpus 1\nprint(1)").text == "1\n"
        time.sleep(1)


def test_a_session_directory_that_was_cleared_away_is_made_anew(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("%%ddp --cpus 1\npass")
    kernel.ok("import shutil, nbddp._function as f\nshutil.rmtree(f.client.session.root)")
    assert kernel.ok("%%ddp --cpus 1\nprint('again')").text == "again\n"


# As on a machine with GPUs: the prompt comes back when every process is gone.
WAIT_UNTIL_GONE = """
import functools, nbddp._prepared as prepared, nbddp._run as run
def Patched(*args, **kwargs):
    return run.Run(*args, **{**kwargs, "wait_until_gone": True})
prepared.Run = Patched
"""


def test_results_outlive_the_processes(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("class Slow:\n    def __setstate__(self, state):\n        import time; time.sleep(0.5)\nslow = Slow()\n")
    kernel.ok("slow.x = 1\nimport nbddp\ndef f():\n    return slow, 'x' * (1 << 21)")
    assert kernel.get("len(nbddp.launch(f, cpus=3))") == 3
    kernel.ok(WAIT_UNTIL_GONE)
    assert kernel.get("len(nbddp.launch(f, cpus=3))") == 3


def test_a_timeout_that_passes_after_the_cell_changes_nothing(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok(WAIT_UNTIL_GONE)
    # Something that takes long after the rank's last word, as NCCL's clean-up may.
    reply = kernel.ok(
        "%%ddp --cpus 2 --timeout 4 --out x\nimport time, torch.distributed as dist\nx = 5\n"
        "def slow():\n    time.sleep(4.5)\ndist.destroy_process_group = slow"
    )
    assert reply.seconds > 4
    assert kernel.get("x") == 5


def test_leftovers_of_killed_processes_are_swept() -> None:
    code = (
        "import os, signal; from nbddp._paths import Session; s = Session(); s.new_run(); print(s.root, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    root = run.stdout.strip()
    live = Session()
    assert os.path.isdir(root)
    assert os.path.isdir(f"/dev/shm/{os.path.basename(root)}")
    assert os.path.basename(root) in sweep()
    assert not os.path.exists(root)
    assert not os.path.exists(f"/dev/shm/{os.path.basename(root)}")
    assert os.path.isdir(live.root)
    live.close()
    assert not os.path.exists(live.root)


def test_processes_that_outlived_everything_are_swept(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.client.execute(
        "%%ddp --cpus 1\nimport subprocess, time\n"
        "subprocess.Popen(['sleep', '1002'], start_new_session=True)\nprint('up')\n"
        "time.sleep(100)"
    )
    deadline = time.monotonic() + 20
    sleepers: list[psutil.Process] = []
    while not sleepers and time.monotonic() < deadline:
        sleepers = [p for p in psutil.Process(kernel.pid).children(recursive=True) if p.name() == "sleep"]
        time.sleep(0.05)
    launcher = launcher_of(kernel)
    # All at once: nobody is left to clean up.
    for pid in (launcher.pid, kernel.pid):
        os.kill(pid, signal.SIGSTOP)
    for pid in (launcher.pid, kernel.pid):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    assert sleepers[0].is_running()
    new_kernel()
    sleepers[0].wait(timeout=5)


def fill(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass


def test_a_full_temporary_directory(new_kernel: Callable[..., Kernel], small_disk: Path) -> None:
    kernel = new_kernel(load=False)
    kernel.ok(f"import tempfile\ntempfile.tempdir = {str(small_disk)!r}\nx = 'kept'")
    kernel.ok("%load_ext nbddp")
    assert kernel.ok("%%ddp --cpus 1\nprint('fits')").text == "fits\n"
    fill(small_disk)
    reply = kernel.run("%%ddp --cpus 1\nprint(x)")
    assert reply.error == "LaunchError"
    assert "no space left on device" in reply.message
    assert "Either make room there, or set TMPDIR to another folder" in reply.message
    assert kernel.get("x") == "kept"
    (small_disk / "filler").unlink()
    assert kernel.ok("%%ddp --cpus 1\nprint(x)").text == "kept\n"


def test_a_read_only_temporary_directory(new_kernel: Callable[..., Kernel], small_disk: Path) -> None:
    kernel = new_kernel(load=False)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    kernel.ok(f"import tempfile\ntempfile.tempdir = {str(small_disk)!r}")
    kernel.ok("%load_ext nbddp")
    reply = kernel.run("%%ddp --cpus 1\nprint(1)")
    assert reply.error == "LaunchError"
    assert reply.message.startswith(f"cannot make a session directory in {small_disk}: read-only file system.")


def test_data_goes_to_memory_if_there_is_room_else_to_disk_else_nowhere(
    monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    def write(path: str) -> None:
        Path(path).write_bytes(b"x")

    def write_too_much(path: str) -> None:
        if path.startswith("/dev/shm/"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path)

    session = Session()
    run = session.new_run()
    assert run.store("x", 1000, write).startswith("/dev/shm/")
    # Several ranks ask at once and all see room.
    assert run.store("x", 1000, write_too_much).startswith(session.root)
    # A container's memory limit may be less than its /dev/shm.
    monkeypatch.setattr(_paths._process, "available_memory", lambda: 1 << 20)
    assert run.store("x", 2 << 20, write).startswith(session.root)
    monkeypatch.undo()
    monkeypatch.setattr(_paths, "_SHM", str(small_disk))
    (small_disk / session.name).mkdir()
    run = RunDir.from_environment(run.root)
    assert run.store("x", 1000, write).startswith(session.root)
    with pytest.raises(
        _paths.LaunchError, match=r"no room for 135.2 TB of data: there are .* in .*small and .* in .* free"
    ):
        run.store("x", 123 << 40, write)
    monkeypatch.undo()
    session.close()


def test_cores_and_oom_kills_can_be_asked_for() -> None:
    assert 1 << 20 < _process.available_memory() <= psutil.virtual_memory().total
    assert 1 <= _process.usable_cores() <= (os.cpu_count() or 1)
    assert _process.oom_kills() >= 0


def test_typed_and_complete() -> None:
    assert (PACKAGE / "py.typed").exists()
    for path in PACKAGE.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
