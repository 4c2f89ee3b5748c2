"""A real JupyterLab in a real browser, driven as a person drives it.

The server is JupyterLab's own, the browser a headless Chromium, and between the two and the tests stands Playwright.
What a person does with mouse and keys is done with mouse and keys; what has no test value of its own (opening a file,
starting a cell) goes through JupyterLab's commands. Outputs are read in both forms: as the model that is saved, and as
the DOM that is seen. Nothing sleeps for a fixed time, and nothing waits without an end.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nbformat
import psutil
from playwright.sync_api import Error, Page, sync_playwright

Output = dict[str, Any]

# Seconds for what should take a moment: a command, a click, a kernel's start.
_MOMENT = 30.0

# Seconds in which Playwright may say itself that one of its time-outs has passed.
_GRACE = 5.0

# Seconds between two looks at something.
_LOOK = 0.05

# Names to look for on PATH.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# No sandbox: it takes a kernel that lets root, or the user, make name spaces, and the only page is the tests' own.
# The rest keeps the browser off the network, the GPU and a container's small /dev/shm.
_BROWSER_OPTIONS = (
    "--no-sandbox",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
)

_SERVER_OPTIONS = (
    "--ServerApp.ip=127.0.0.1",
    "--ServerApp.open_browser=False",
    "--ServerApp.allow_root=True",
    "--LabApp.expose_app_in_browser=True",  # as window.jupyterapp
    "--LabApp.extension_manager=readonly",
    # If this process is killed and cannot end the server, it ends by itself.
    "--ServerApp.shutdown_no_activity_timeout=300",
    "--MappingKernelManager.cull_idle_timeout=300",
    "--MappingKernelManager.cull_interval=60",
)

# No news from the network, no saving but when asked to, and cells outside the window are in the DOM as well.
_SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}

_PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
_DIALOG = ".jp-Dialog"


def browser_path() -> str | None:
    """Return the Chromium to use, or None if there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Run:
    """How a cell's run went.

    Attributes:
        status: "ok" or "error"; an interrupted or restarted kernel's cell is an error.
        seconds: From the command to the kernel being idle again.
        changes: How often the DOM of the output area changed: what one step of a script does to it counts once.
        nodes: How many nodes that added and removed.
        stall: The longest time in seconds for which the page did not get to a timer, or to a click.
    """

    status: str
    seconds: float
    changes: int
    nodes: int
    stall: float


class LabNotebook:
    """An open notebook. Cells are named by their index; the first is 0.

    Every method raises an AssertionError, with what the cell's output area has, if what it waits for does not come.
    """

    def __init__(self, lab: Lab, path: Path) -> None:
        self._lab = lab
        self.path = path

    def start(self, cell: int) -> None:
        """Start a cell, and do not wait."""
        self._call("lab.run(path, cell)", cell)

    def wait(self, cell: int, *, timeout: float = 60.0) -> Run:
        """Wait for the end of a cell that was started; afterwards, tell once more what its DOM has gone through."""
        self.until(cell, "c => c.run.done", timeout=timeout)
        run, stall = self._call("[lab.view(path, cell).run, lab.stall()]", cell)
        return Run("ok" if run["ok"] else "error", run["seconds"], run["changes"], run["nodes"], stall)

    def run(self, cell: int, *, timeout: float = 60.0) -> Run:
        """Run a cell and wait for its end."""
        self.start(cell)
        return self.wait(cell, timeout=timeout)

    def ok(self, cell: int, *, timeout: float = 60.0) -> Run:
        """Run a cell that must not fail."""
        run = self.run(cell, timeout=timeout)
        assert run.status == "ok", self._describe(cell, "failed")
        return run

    def until(self, cell: int, predicate: str | Callable[[list[Output]], bool], *, timeout: float = _MOMENT) -> None:
        """Wait until something holds for a cell's output.

        Args:
            cell: The cell.
            predicate: A JavaScript function of an object with `area` (the DOM element), `outputs` (the list that is
                saved), `text` (what is to be seen) and `run`; or a Python function of the list of outputs.
            timeout: In seconds.
        """
        if isinstance(predicate, str):
            try:
                self._lab.until(f"([path, cell]) => ({predicate})(lab.view(path, cell))", [self.name, cell], timeout)
            except AssertionError as error:
                raise AssertionError(self._describe(cell, str(error))) from error
            return
        deadline = time.monotonic() + timeout
        while not predicate(self.outputs(cell)):
            assert time.monotonic() < deadline, self._describe(cell, f"{predicate} did not hold within {timeout:.0f} s")
            with self._lab.using() as page:
                page.wait_for_timeout(_LOOK * 1000)

    def until_text(self, cell: int, text: str, *, timeout: float = _MOMENT) -> None:
        """Wait until a text is to be seen in a cell's output area."""
        self.until(cell, f"c => c.text.includes({json.dumps(text)})", timeout=timeout)

    def outputs(self, cell: int) -> list[Output]:
        """Return a cell's outputs as they would be saved."""
        outputs: list[Output] = self._call("lab.view(path, cell).outputs", cell)
        return outputs

    def count(self, cell: int) -> int:
        """Return how many outputs a cell has."""
        return len(self.outputs(cell))

    def displays(self, cell: int, mime: str | None = None) -> list[Any]:
        """Return the mime bundles of a cell's `display_data`, or what each holds of one type: None where nothing."""
        bundles = [output["data"] for output in self.outputs(cell) if output["output_type"] == "display_data"]
        return bundles if mime is None else [bundle.get(mime) for bundle in bundles]

    def error(self, cell: int) -> str:
        """Return the name of a cell's exception, or an empty string."""
        return next((output["ename"] for output in self.outputs(cell) if output["output_type"] == "error"), "")

    def text(self, cell: int) -> str:
        """Return what is to be seen in a cell's output area, as text."""
        return str(self._call("lab.view(path, cell).text", cell))

    def html(self, cell: int) -> str:
        """Return the HTML of a cell's output area as the browser has it, after JupyterLab's sanitizer and renderers."""
        return str(self._call("lab.view(path, cell).area.innerHTML", cell))

    def size(self, cell: int, selector: str = "") -> tuple[float, float]:
        """Return width and height in pixels of the first element in a cell's output area that matches.

        Args:
            cell: The cell.
            selector: A CSS selector; an empty one means the output area itself.

        Returns:
            (0, 0) if there is none, or if it is hidden.
        """
        width, height = self._call(f"lab.size(path, cell, {json.dumps(selector)})", cell)
        return width, height

    def visible(self, cell: int, selector: str = "") -> bool:
        """Tell whether an element of a cell's output area is there and takes up room."""
        return min(self.size(cell, selector)) > 0

    def click(self, cell: int, selector: str) -> None:
        """Click on the first element in a cell's output area that matches a CSS selector."""
        with self._lab.using() as page:
            area = page.evaluate_handle("([path, cell]) => lab.view(path, cell).area", [self.name, cell]).as_element()
            assert area is not None
            found = area.query_selector(selector)
            assert found is not None, f"nothing in the output of cell {cell} matches {selector}"
            found.click()

    def trusted(self, cell: int) -> bool:
        """Tell whether JupyterLab trusts a cell's output: else it takes scripts and styles out of HTML."""
        return bool(self._call("lab.view(path, cell).model.trusted", cell))

    def press_interrupt(self) -> None:
        """Press the Interrupt button of the toolbar."""
        self._call("lab.activate(path, cell)", 0)
        with self._lab.using() as page:
            page.click(f'{_PANEL} [data-jp-item-name="interrupt"] jp-button')

    def press_i_i(self, cell: int) -> None:
        """Press `I` twice with a cell selected, which interrupts the kernel."""
        self.select(cell)
        with self._lab.using() as page:
            page.keyboard.press("i")
            page.keyboard.press("i")

    def select(self, cell: int) -> None:
        """Click on the left of a cell, which selects it and leaves JupyterLab in command mode."""
        self._call("lab.activate(path, cell)", cell)
        with self._lab.using() as page:
            page.click(f"{_PANEL} .jp-Cell.jp-mod-active .jp-InputPrompt")
            page.wait_for_selector(f"{_PANEL} .jp-Notebook.jp-mod-commandMode")

    def restart(self) -> None:
        """Restart the kernel by JupyterLab's command, say yes, and wait until the new one is there."""
        self._call("lab.restart(path)")
        with self._lab.using() as page:
            page.click(f"{_DIALOG} button.jp-mod-accept")
        self._lab.until("() => lab.restarted === true")

    def save(self) -> nbformat.NotebookNode:
        """Save the notebook; return what the file then holds."""
        self._call("lab.save(path)")
        return nbformat.read(str(self.path), as_version=4)

    def reload(self) -> None:
        """Load the page anew, and open the notebook in it, with the kernel that it has; what was not saved is lost."""
        self._lab.load()
        self._open()

    def screenshot(self, cell: int, path: Path) -> None:
        """Write a picture of a cell's output area to a PNG file."""
        with self._lab.using() as page:
            area = page.evaluate_handle("([path, cell]) => lab.view(path, cell).area", [self.name, cell]).as_element()
            assert area is not None
            area.screenshot(path=path, animations="disabled")

    def close(self) -> None:
        """Close the notebook without saving it, and shut its kernel down."""
        self._lab.close_notebook(self)

    @property
    def name(self) -> str:
        """The path as JupyterLab has it."""
        return self.path.name

    def _open(self) -> None:
        self._call("lab.open(path)")

    def _call(self, expression: str, cell: int = 0) -> Any:
        return self._lab.evaluate(f"([path, cell]) => {expression}", [self.name, cell])

    def _describe(self, cell: int, reason: str) -> str:
        try:
            state = self._call("lab.state(path, cell)", cell)
            text = self.text(cell)
            outputs = json.dumps(self.outputs(cell), indent=1)
        except AssertionError as error:  # the page is gone, or hangs
            return f"cell {cell} of {self.name}: {reason}\nnothing more is known: {error}"
        where = f"cell {cell} of {self.name}: {reason}\n{state}"
        return f"{where}\nto be seen:\n{_short(text)}\noutputs:\n{_short(outputs)}\nserver:\n{self._lab.log()[-1500:]}"


class Lab:
    """A JupyterLab server and a browser with one page, in which notebooks are opened one after the other.

    A page takes seconds to load, and another tab none, so that one page serves all tests. While this is open,
    Playwright has an event loop in the thread, and asyncio refuses to run another there.

    Args:
        folder: A new folder, for everything: notebooks, settings, the server's log.
        browser: Chromium's path.
    """

    def __init__(self, folder: Path, browser: str) -> None:
        self._folder = folder
        self._browser = browser
        self._token = secrets.token_hex(16)
        self._notebooks: list[LabNotebook] = []
        self._count = 0
        self._page: Page | None = None
        self.notebooks = folder / "notebooks"
        self._stack = contextlib.ExitStack()
        try:
            self._start_server()
            self._others = set(psutil.Process().children(recursive=True))
            self._playwright = self._stack.enter_context(sync_playwright())
        except BaseException:
            self._stack.close()
            raise

    def open(self, cells: list[str]) -> LabNotebook:
        """Write a notebook of these code cells, and open it with a kernel of its own."""
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
        return self.open_file(notebook)

    def open_file(self, content: nbformat.NotebookNode) -> LabNotebook:
        """Write a notebook file of this content, and open it.

        JupyterLab trusts outputs by a signature of the content: an exact copy of what it has saved is trusted, and one
        in which a single character differs is not.
        """
        self._count += 1
        path = self.notebooks / f"test{self._count}.ipynb"
        nbformat.write(content, str(path))
        notebook = LabNotebook(self, path)
        self._notebooks.append(notebook)
        notebook._open()
        return notebook

    def theme(self, name: Literal["JupyterLab Light", "JupyterLab Dark"]) -> None:
        """Change the theme, and wait until its colours are there."""
        self.evaluate('name => { window.jupyterapp.commands.execute("apputils:change-theme", { theme: name }); }', name)
        self.until("name => document.body.dataset.jpThemeName === name", name)

    @contextlib.contextmanager
    def using(self, seconds: float = _MOMENT) -> Iterator[Page]:
        """Give the page to a block of code; what fails there is an AssertionError.

        Playwright waits without an end for a page that hangs, whatever time-out it is given. So if the block takes
        longer than that, the browser is killed, which ends the wait; the next to use the page gets a new one.
        """
        if self._page is None or not self._page.context.browser or not self._page.context.browser.is_connected():
            self._start_browser()
        assert self._page is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            for process in set(psutil.Process().children(recursive=True)) - self._others:
                with contextlib.suppress(psutil.Error):
                    if "chrom" in process.name():
                        process.kill()

        timer = threading.Timer(seconds + _GRACE, kill)
        timer.start()
        try:
            yield self._page
        except Error as error:
            reason = f"the page hung for {seconds:.0f} s, and was killed" if late.is_set() else error.message
            raise AssertionError(reason) from error
        finally:
            timer.cancel()
            timer.join()

    def evaluate(self, script: str, arg: Any = None, seconds: float = _MOMENT) -> Any:
        """Call a JavaScript function in the page; return what it, or its promise, returns."""
        with self.using(seconds) as page:
            return page.evaluate(script, arg)

    def until(self, script: str, arg: Any = None, seconds: float = _MOMENT) -> None:
        """Wait until a JavaScript function in the page returns what is true there."""
        try:
            with self.using(seconds) as page:
                page.wait_for_function(script, arg=arg, timeout=seconds * 1000, polling=100)
        except AssertionError as error:
            reason = str(error).splitlines()[0]  # the rest is Playwright's own stack
            raise AssertionError(f"{script} did not hold within {seconds:.0f} s: {reason}") from error

    def log(self) -> str:
        """Return what the server has logged."""
        return (self._folder / "server.log").read_text(errors="replace")

    def load(self) -> None:
        """Load the page anew.

        Without the notebooks that were open: JupyterLab opens those some time later, by itself, and what is opened last
        is what the next command goes to.
        """
        with self.using() as page:
            page.goto(f"{self._url}lab?reset&token={self._token}", wait_until="domcontentloaded")
        self.until("() => window.jupyterapp !== undefined", seconds=60)
        self.evaluate("() => window.jupyterapp.restored.then(() => true)", seconds=60)

    def close_notebook(self, notebook: LabNotebook) -> None:
        """Close one notebook, and shut its kernel down."""
        self._notebooks.remove(notebook)
        with contextlib.suppress(AssertionError):  # a page that hangs must not keep the kernel alive
            with self.using() as page:
                if page.query_selector(_DIALOG):  # that a failed test has left
                    page.keyboard.press("Escape")
            notebook._call("lab.close(path)")
        for session in self._ask("GET", "sessions"):
            if session["path"] == notebook.name:
                self._ask("DELETE", f"sessions/{session['id']}")

    def close_notebooks(self) -> None:
        """Close all notebooks, and shut their kernels down."""
        for notebook in list(self._notebooks):
            self.close_notebook(notebook)
        for kernel in self._ask("GET", "kernels"):  # of a page that was killed, say
            self._ask("DELETE", f"kernels/{kernel['id']}")

    def close(self) -> None:
        """End the browser and the server, with what they have started."""
        try:
            self.close_notebooks()
            if self._page is not None:
                with contextlib.suppress(AssertionError), self.using() as page:
                    assert page.context.browser is not None
                    page.context.browser.close()
        finally:
            self._stack.close()

    def _start_server(self) -> None:
        for name in ("home", "notebooks", "config/labconfig", "data", "runtime", "ipython", "settings", "workspaces"):
            (self._folder / name).mkdir(parents=True)
        (self._folder / "config/labconfig/default_setting_overrides.json").write_text(json.dumps(_SETTINGS))
        foreign = ("JUPYTER", "JPY_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "HOME": str(self._folder / "home"),
            "IPYTHONDIR": str(self._folder / "ipython"),
            "JUPYTER_CONFIG_DIR": str(self._folder / "config"),
            "JUPYTER_DATA_DIR": str(self._folder / "data"),
            "JUPYTER_RUNTIME_DIR": str(self._folder / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(self._folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self._folder / "workspaces"),
            "JUPYTER_TOKEN": self._token,  # not an argument: those are for all to see
        }
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        log = self._stack.enter_context((self._folder / "server.log").open("w"))
        own = (f"--ServerApp.port={port}", f"--ServerApp.root_dir={self.notebooks}")
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *_SERVER_OPTIONS, *own],
            env=environment,
            cwd=self.notebooks,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        self._stack.callback(_end, server)
        deadline = time.monotonic() + 60
        # If somebody else has taken the port meanwhile, the server takes another. This says which.
        info = self._folder / "runtime" / f"jpserver-{server.pid}.json"
        while True:
            with contextlib.suppress(OSError, ValueError):
                self._url = json.loads(info.read_text())["url"]
                self._ask("GET", "status")
                return
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start:\n{_short(self.log())}")
            time.sleep(_LOOK)

    def _ask(self, method: str, what: str) -> Any:
        """Ask the server by its REST interface."""
        header = {"Authorization": f"token {self._token}"}
        request = urllib.request.Request(f"{self._url}api/{what}", method=method, headers=header)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_MOMENT) as answer:
            return json.loads(answer.read() or b"null")

    def _start_browser(self) -> None:
        browser = self._playwright.chromium.launch(
            executable_path=self._browser,
            args=list(_BROWSER_OPTIONS),
            env={**os.environ, "HOME": str(self._folder / "home")},
            timeout=_MOMENT * 1000,
        )
        self._page = browser.new_page(viewport={"width": 1200, "height": 900})
        self._page.set_default_timeout(_MOMENT * 1000)
        self._page.add_init_script(path=Path(__file__).with_suffix(".js"))
        # "Leave without saving?" is yes: only what a test saves is to be kept.
        self._page.on("dialog", lambda dialog: dialog.accept())
        self.load()


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server, which ends its kernels; kill what does not end."""
    started = [psutil.Process(server.pid)] if server.poll() is None else []
    started += [child for process in started for child in process.children(recursive=True)]
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(15)
    _, alive = psutil.wait_procs(started, timeout=1)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    server.wait()


def _short(text: str) -> str:
    return text if len(text) < 4000 else f"{text[:2000]}\n[...]\n{text[-2000:]}"
