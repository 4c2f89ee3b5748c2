"""Signals that come while the agent, or the ranks, are being started: none is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import Kernel, Request

# In every process of the kernel's, by Python itself: around a fork by a process that has a handler for a certain
# signal, once, what forks or what was just forked sends itself a signal.
SITE = """
import os, signal

def hit(where):
    if callable(signal.getsignal(signal.{handled})):
        try:
            os.rename({folder!r} + "/" + where, {folder!r} + "/was." + where)
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.{signum})
        sum(range(1000))  # here it would be handled, if it did not wait

os.register_at_fork(
    before=lambda: hit("before"), after_in_parent=lambda: hit("parent"), after_in_child=lambda: hit("child")
)
"""


@pytest.fixture
def run(new_kernel: Callable[..., Kernel], tmp_path: Path) -> Callable[..., Request]:
    """Run a cell of three ranks in whose start there is a signal; return what came of it."""

    def run(where: str, signum: str, *, handled: str) -> Request:
        (tmp_path / "sitecustomize.py").write_text(SITE.format(folder=str(tmp_path), signum=signum, handled=handled))
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        kernel = new_kernel(env={"PYTHONPATH": path})
        kernel.ok("%%ddp --cpus 2\npass")
        (tmp_path / where).touch()
        request = kernel.ask("%%ddp --cpus 3\nimport time\nprint('up')\ntime.sleep(60)")
        assert request.wait(6), request.reply.text
        assert (tmp_path / f"was.{where}").exists()
        assert kernel.ok("%%ddp --cpus 2\nprint('works')").lines == ["[rank 0] works", "[rank 1] works"]
        return request

    return run


# SIGINT to the agent goes on to ranks that may be in C++, and do not hear it; then torchrun waits.
@pytest.mark.parametrize(
    ("where", "signum"), [("before", "SIGTERM"), ("parent", "SIGTERM"), ("child", "SIGTERM"), ("child", "SIGINT")]
)
def test_a_signal_while_the_agent_forks_ranks_ends_the_run(
    run: Callable[..., Request], where: str, signum: str
) -> None:
    # Of the processes that fork, torchrun alone handles SIGTERM.
    request = run(where, signum, handled="SIGTERM")
    assert request.reply.error in {"RankError", "LaunchError"}, request.reply.traceback


def test_a_signal_to_the_agent_before_torchrun_handles_any(run: Callable[..., Request]) -> None:
    # Of the processes that fork, the launcher alone handles SIGCHLD.
    request = run("child", "SIGTERM", handled="SIGCHLD")
    assert request.reply.error == "LaunchError"
    assert request.reply.message == (
        "torchrun could not start the ranks: its agent was killed by signal 15 (SIGTERM)"
    ), request.reply.traceback
