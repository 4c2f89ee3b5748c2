"""A real Jupyter kernel, driven as a front end drives it."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import queue
import re
import secrets
import signal
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LABEL_COLOUR = re.compile(r"\x1b\[38;5;\d+m([\[(](?:node\d+ )?rank +\d+[\])])\x1b\[0m")


# For cells: what the kernel's descriptors lead to.
LINKS = """
import os
def links():
    # One may go away between two looks: the thread that saves IPython's history has its own.
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            pass
    return found
"""


class _Manager(KernelManager):  # type: ignore[misc]  # traitlets' classes are there to be subclassed
    """Starts a kernel by another command."""

    command: Sequence[str] = ()

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        return [*self.command, *super().format_kernel_cmd(extra_arguments)]


@dataclass
class Reply:
    """What a cell showed.

    Attributes:
        status: "ok" or "error".
        outputs: The output messages: (type, content).
        seconds: From the request to the kernel being idle again.
    """

    status: str = ""
    outputs: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """What was printed, without the colours of nbddp's labels."""
        return _LABEL_COLOUR.sub(r"\1", self.raw)

    @property
    def raw(self) -> str:
        """What was printed."""
        return "".join(content["text"] for kind, content in self.outputs if kind == "stream")

    @property
    def lines(self) -> list[str]:
        """What was printed, line by line, in sorted order: ranks print in any."""
        return sorted(self.text.splitlines())

    @property
    def stderr(self) -> str:
        return "".join(c["text"] for kind, c in self.outputs if kind == "stream" and c["name"] == "stderr")

    @property
    def error(self) -> str:
        """The name of the exception, or an empty string."""
        return next((c["ename"] for kind, c in self.outputs if kind == "error"), "")

    @property
    def message(self) -> str:
        """The exception's message."""
        return next((c["evalue"] for kind, c in self.outputs if kind == "error"), "")

    @property
    def traceback(self) -> str:
        """The traceback as shown, without its colours."""
        return next((_ANSI.sub("", "\n".join(c["traceback"])) for kind, c in self.outputs if kind == "error"), "")

    @property
    def failure(self) -> str:
        """What the error says of the rank at fault: its message, or what follows the traceback of its exception."""
        raised = re.search(r"^(rank \d+( of \d+)? raised) this$", self.traceback, re.MULTILINE)
        if raised is None:
            return self.message
        return f"{raised[1]} {self.error}: {self.message}" if self.message else f"{raised[1]} {self.error}"

    @property
    def value(self) -> dict[str, Any] | None:
        """The mime bundle of the cell's value."""
        return next((c["data"] for kind, c in self.outputs if kind == "execute_result"), None)

    @property
    def displays(self) -> list[dict[str, Any]]:
        """The mime bundles that were displayed, without the panel."""
        return [c["data"] for kind, c in self.outputs if kind == "display_data" and not _is_panel(c["data"])]

    @property
    def panels(self) -> list[dict[str, Any]]:
        """The states of the panel, one after the other."""
        kinds = ("display_data", "update_display_data")
        return [c["data"] for kind, c in self.outputs if kind in kinds and _is_panel(c["data"])]


def _is_panel(data: dict[str, Any]) -> bool:
    return bool(data.get("text/plain", "").startswith("nbddp:"))


class Request:
    """A cell that a kernel was asked to run; nobody need wait for it, and the kernel may die meanwhile.

    Attributes:
        reply: What it has shown so far, also after its end and while other cells run; `seconds` and `status` come at
            its end.
        returned_at: When the kernel was idle again (``time.monotonic``).
        failed_at: When its error message came.
    """

    def __init__(self, client: BlockingKernelClient, code: str) -> None:
        self._client = client
        self._asked_at = time.monotonic()
        self.id: str = client.execute(code, allow_stdin=False, stop_on_error=False)
        self.reply = Reply()
        self.returned_at: float | None = None
        self.failed_at: float | None = None

    def wait(self, seconds: float, until: Callable[[], object] = lambda: False) -> bool:
        """Wait until the kernel is idle again, or for so long, or until `until` is true; tell whether it is idle."""
        deadline = time.monotonic() + seconds
        while self.returned_at is None and time.monotonic() < deadline and not until():
            self._look()
        return self.returned_at is not None

    def follow(self, until: Callable[[Reply], object], seconds: float = 30.0) -> None:
        """Wait until something holds for what it has shown, after its end as well."""
        deadline = time.monotonic() + seconds
        while not until(self.reply):
            assert time.monotonic() < deadline, f"not so within {seconds:.0f} s; shown was: {self.reply.outputs}"
            self._look()

    def _look(self) -> None:
        with contextlib.suppress(queue.Empty):
            self._client.get_iopub_msg(timeout=0.01)  # the kernel hands it on

    def take(self, kind: str, content: dict[str, Any]) -> None:
        """Take note of a message that came for this cell."""
        if kind != "status":
            self.reply.outputs.append((kind, content))
        if kind == "error":
            self.failed_at = time.monotonic()
        if kind == "status" and content["execution_state"] == "idle":
            self.returned_at = time.monotonic()
            self.reply.seconds = self.returned_at - self._asked_at
            self.reply.status = "ok" if self.failed_at is None else "error"


class Kernel:
    """A kernel and the one client that talks to it.

    Args:
        env: Environment variables besides this process's own; None as a value removes one.
        cwd: Its working directory.
        command: What its command is put behind, such as ``setpriv`` with options.
        transport: How it is talked to, "tcp" on loopback, or "ipc", which reaches into another network namespace.
    """

    def __init__(
        self,
        *,
        env: dict[str, str | None] | None = None,
        cwd: str | None = None,
        command: Sequence[str] = (),
        transport: str = "tcp",
    ) -> None:
        self._manager = _Manager(kernel_name="python3", transport=transport)
        if transport == "ipc":
            self._manager.ip = f"{os.environ['TMPDIR']}/kernel-{secrets.token_hex(4)}"  # of the sockets' names
        self._manager.command = command
        full = {**os.environ, **(env or {})}
        self._manager.start_kernel(
            env={k: v for k, v in full.items() if v is not None},
            cwd=cwd or os.environ["TMPDIR"],
            extra_arguments=["--log-level=ERROR"],
        )
        self.client = self._manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        provisioner: Any = self._manager.provisioner
        self.pid: int = provisioner.pid
        # Whoever reads messages, each is noted with the cell that it is for: those that come after the cell's end, too.
        self._requests: weakref.WeakValueDictionary[str, Request] = weakref.WeakValueDictionary()
        receive = self.client.iopub_channel.get_msg

        def note(message: dict[str, Any]) -> dict[str, Any]:
            if (request := self._requests.get(message["parent_header"].get("msg_id"))) is not None:
                request.take(message["msg_type"], message["content"])
            return message

        async def noted(coming: Awaitable[dict[str, Any]]) -> dict[str, Any]:
            return note(await coming)

        def receive_and_note(*args: Any, **kwargs: Any) -> Any:
            message = receive(*args, **kwargs)
            return noted(message) if inspect.isawaitable(message) else note(message)  # older clients await it

        self.client.iopub_channel.get_msg = receive_and_note

    def run(
        self,
        code: str,
        *,
        timeout: float = 60.0,
        seen: Callable[[Reply, dict[str, Any]], object] = lambda *_: None,
        stdin: Sequence[str] = (),
    ) -> Reply:
        """Run a cell and wait for its end.

        Args:
            code: The cell.
            timeout: Seconds to wait.
            seen: Called with the reply so far and each new output message.
            stdin: What is typed when the kernel asks for input.
        """
        reply = Reply()
        typed = iter(stdin)

        def collect(message: dict[str, Any]) -> None:
            reply.outputs.append((message["msg_type"], message["content"]))
            seen(reply, message)

        began = time.perf_counter()
        answer = self.client.execute_interactive(
            code,
            output_hook=collect,
            stdin_hook=lambda _: self.client.input(next(typed)),
            timeout=timeout,
            allow_stdin=bool(stdin),
            stop_on_error=False,
        )
        reply.seconds = time.perf_counter() - began
        reply.status = answer["content"]["status"]
        return reply

    def ask(self, code: str) -> Request:
        """Ask for a cell without waiting for it."""
        request = Request(self.client, code)
        self._requests[request.id] = request
        return request

    def begin(self, code: str) -> Request:
        """Run a cell that must not fail, and go on taking note of what it shows."""
        request = self.ask(code)
        assert request.wait(60), f"the cell has not ended; shown was: {request.reply.outputs}"
        assert request.reply.status == "ok", request.reply.traceback
        return request

    def run_timed(self, code: str, sent: list[tuple[float, str, int]]) -> Reply:
        """Run a cell; add each output message to `sent`: when it came, its type, and its size in bytes."""

        def note(_: Reply, message: dict[str, Any]) -> None:
            size = len(json.dumps(message["content"], ensure_ascii=False).encode())
            sent.append((time.monotonic(), message["msg_type"], size))

        return self.run(code, timeout=120, seen=note)

    def ok(self, code: str, *, timeout: float = 60.0) -> Reply:
        """Run a cell that must not fail."""
        reply = self.run(code, timeout=timeout)
        assert reply.status == "ok", reply.traceback
        return reply

    def get(self, expression: str) -> Any:
        """Return the value of an expression, as far as its repr tells it."""
        import ast

        shown = self.ok(f"print(repr(({expression})))").text
        return ast.literal_eval(shown)

    def settles(self, expression: str, value: object, seconds: float = 5.0) -> None:
        """Fail unless an expression has this value soon: threads and descriptors of a run may take a moment to go."""
        deadline = time.monotonic() + seconds
        while (now := self.get(expression)) != value:
            assert time.monotonic() < deadline, f"{expression} is {now}, not {value}"
            time.sleep(0.1)

    def interrupt(self) -> None:
        """Do what the stop button does: SIGINT to the kernel's process group."""
        os.killpg(os.getpgid(self.pid), signal.SIGINT)

    def run_and(self, code: str, when: str, action: Any, *, timeout: float = 60.0) -> Reply:
        """Run a cell, and call `action` once its output holds `when`."""
        done = threading.Event()

        def look(reply: Reply, _: dict[str, Any]) -> None:
            if not done.is_set() and when in reply.text:
                done.set()
                action()

        reply = self.run(code, timeout=timeout, seen=look)
        assert done.is_set(), f"{when!r} was never shown; shown was: {reply.text}\n{reply.traceback}"
        return reply

    def run_and_after(self, code: str, seconds: float, action: Any, *, timeout: float = 60.0) -> Reply:
        """Run a cell, and call `action` some time after the request."""
        timer = threading.Timer(seconds, action)
        timer.start()
        try:
            return self.run(code, timeout=timeout)
        finally:
            timer.cancel()
            timer.join()

    def wait_idle(self, *, timeout: float = 30.0) -> None:
        """Wait until everything that was asked of the kernel is done, and forget what it showed."""
        self.ok("", timeout=timeout)

    def alive(self) -> bool:
        """Tell whether the process is there."""
        return bool(self._manager.is_alive())

    def kill(self) -> None:
        """Kill the kernel's process as the OOM killer would."""
        os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.02)

    def shut_down(self) -> None:
        """Shut the kernel down as a server does; what it has shown until then can still be taken note of."""
        self._manager.shutdown_kernel()

    # Whether a test's own kernel is shut down at its end and not killed: without a launcher nobody would clear up.
    ends_politely = False

    def close(self, *, politely: bool = True) -> None:
        """Shut the kernel down as a server does, or kill it, which is a second faster; give up its messages."""
        with contextlib.suppress(Exception):
            self.client.stop_channels()
        with contextlib.suppress(Exception):
            self._manager.shutdown_kernel(now=not (politely and self.alive()))
        self._manager.cleanup_resources()
