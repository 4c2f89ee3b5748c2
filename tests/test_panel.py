"""The panel: what it says, and that it is one display which a quick cell does not get."""

from __future__ import annotations

import html.parser
import re
import time
from pathlib import Path
from typing import Any

import pytest

from nbddp import _palette
from nbddp._panel import Fold, Row, Summary, as_html, as_text, summary_as_html
from nbddp._progress import Progress
from tests.kernel import Kernel

ROWS = [
    Row(0, "running", 7, [Progress(0.5, "epoch", "1/2", "00:10")], "1.2 GB", "loss 0.5"),
    Row(1, "waiting in all_reduce", 9, [], "1.1 GB", "<script>alert(1)</script>"),
    Row(2, "failed"),
]


class Tags(html.parser.HTMLParser):
    """Collects what a sanitiser would look at; fails on tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.styles = ""
        self.content = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles += " ".join(value or "" for name, value in attrs if name == "style")
        if tag != "br":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.content += data + "\n"


def test_as_text() -> None:
    bar = "epoch ██████████░░░░░░░░░░  50%, 1/2, 00:10 left"
    assert as_text("nbddp: 3 ranks, 12 s", ROWS).splitlines() == [
        "nbddp: 3 ranks, 12 s",
        f"rank 0  running, line 7                {bar}  1.2 GB  loss 0.5",
        f"rank 1  waiting in all_reduce, line 9  {' ' * len(bar)}  1.1 GB  <script>alert(1)</script>",
        "rank 2  failed",
    ]


def test_as_html_it_passes_sanitisers_and_says_the_same() -> None:
    tags = Tags(as_html("nbddp: 3 ranks, 12 s", ROWS))
    assert tags.tags <= {"div", "table", "tr", "td", "span", "progress", "br"}
    assert tags.attributes <= {"style", "value", "max"}
    assert "var(" not in tags.styles
    assert "<script>" in tags.content  # as text
    for words in ("rank 0", "running, line 7", "epoch", "50%, 1/2, 00:10 left", "1.2 GB", "loss 0.5", "failed"):
        assert words in tags.content


def test_a_summary_passes_sanitisers_and_escapes() -> None:
    folds = [Fold(0, "rank 0: x", "a < b\n\x1b[31mred\x1b[0m"), Fold(1, "rank 1", "")]
    text = summary_as_html(Summary("2 ranks <b>", folds, open=1))
    tags = Tags(text)
    assert tags.tags <= {"details", "summary", "pre", "div", "code"}
    assert "2 ranks <b>" in tags.content
    assert "a < b\nred" in tags.content
    assert [bool(opened) for opened in re.findall(r"<details( open)?", text)] == [True, False, True]


def luminance(colour: str) -> float:
    def linear(part: int) -> float:
        share = part / 255
        return float(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)

    red, green, blue = (linear(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("background", ["#ffffff", "#111111"])
def test_colours_can_be_read(background: str) -> None:
    """WCAG asks for a contrast of 3 of large or bold text and of graphics."""
    for _, colour in _palette.COLOURS:
        lighter, darker = sorted((luminance(colour), luminance(background)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3, colour


def test_the_palette_is_the_256_colour_tables() -> None:
    steps = (0, 95, 135, 175, 215, 255)
    for number, colour in _palette.COLOURS:
        cube = number - 16
        parts = steps[cube // 36], steps[cube // 6 % 6], steps[cube % 6]
        assert "#{:02x}{:02x}{:02x}".format(*parts) == colour


# In a kernel.


def test_a_quick_cell_shows_its_lines_and_nothing_else(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 2\nprint('hi')")
    assert {kind for kind, _ in reply.outputs} <= {"status", "execute_input", "stream"}


LONG = """%%ddp --cpus 2
import sys, time, torch, torch.distributed as dist
from tqdm import tqdm
for step in tqdm(range(20), desc='steps'):
    time.sleep(0.12)
    print('step', step)
if rank == 1:
    time.sleep(2.5)
dist.barrier()
"""


def test_a_long_run_has_one_panel_that_moves(kernel: Kernel) -> None:
    reply = kernel.ok(LONG)
    assert sum(kind == "display_data" for kind, _ in reply.outputs) == 1
    texts = [panel["text/plain"] for panel in reply.panels]
    assert len(texts) > 4
    during = "\n".join(texts[:-1])
    assert re.search(r"rank 0  running, line \d+ +steps █+░+ +\d+%, \d+/20, 00:0\d left +\d+ MB  step \d+", during)
    assert "rank 0  waiting in barrier, line 9" in during
    assert re.fullmatch(r"nbddp: 2 ranks done in \d s", texts[-1])
    assert all("text/html" in panel for panel in reply.panels)
    assert "step 19" in reply.panels[-1]["text/html"]
    # The bars are in the panel; of each the text has the last state.
    assert sum("steps: 100%" in line for line in reply.lines) == 2
    assert sum("steps:" in line for line in reply.lines) == 2
    assert len(reply.lines) == 42


def test_a_failed_run_says_which_rank_in_its_summary(kernel: Kernel) -> None:
    reply = kernel.run(
        "%%ddp --cpus 2\nimport time\nprint('hello')\ntime.sleep(1.6)\nif rank == 1:\n    1 / 0\ntime.sleep(9)"
    )
    assert reply.error == "ZeroDivisionError"
    assert re.fullmatch(
        r"nbddp: rank 1 failed after \d s \(ZeroDivisionError: division by zero\)", reply.panels[-1]["text/plain"]
    )
    assert "rank 0: stopped, 1 line" in reply.panels[-1]["text/html"]
    assert "<details open" in reply.panels[-1]["text/html"]


@pytest.mark.parametrize("how", ["--plain", "setting", "environment", "capture"])
def test_plain_output_has_no_panel_and_is_the_same_every_time(new_kernel: Any, how: str) -> None:
    kernel = new_kernel(env={"NBDDP_PLAIN": "1"} if how == "environment" else {})
    if how == "setting":
        kernel.ok("%config DDPMagics.plain = True")
    cell = (
        f"%%ddp --cpus 2 {'--plain' if how == '--plain' else ''}\nimport time, sys\n"
        "for i in range(3):\n    print(i, rank)\n    time.sleep(0.5 if rank else 0.4)\nprint('err', file=sys.stderr)"
    )
    if how == "capture":
        kernel.ok(f"%%capture caught\nget_ipython().run_cell_magic('ddp', '--cpus 2', {cell.partition(chr(10))[2]!r})")
        assert kernel.get("len(caught.outputs)") == 0
        text = kernel.get("caught.stdout")
    else:
        reply = kernel.ok(cell)
        assert not reply.panels
        text = reply.raw
    ranks = [f"[rank {r}] {i} {r}\n" for r in range(2) for i in range(3)]
    ranks[3:3] = ["(rank 0) err\n"]
    assert text == "".join([*ranks, "(rank 1) err\n"])


def test_status_from_a_thread(kernel: Kernel) -> None:
    assert kernel.ok("%ddp status").text == "nbddp: nothing is running\n"
    kernel.ok(
        "import threading, time, io, contextlib\nsaid = []\ndef ask():\n    time.sleep(1.5)\n"
        "    from nbddp._commands import status\n    said.append(status())\n"
        "thread = threading.Thread(target=ask)\nthread.start()"
    )
    kernel.ok("%%ddp --cpus 2 --plain\nimport time\ntime.sleep(1 if rank else 2.5)")
    said = kernel.get("thread.join() or said[0]").splitlines()
    assert re.fullmatch(r"nbddp: 2 ranks, \d s", said[0])
    assert re.match(r"rank 0  running, line 3 +\d+ MB", said[1])
    assert said[2].startswith("rank 1  done")


def test_status_from_a_subshell(kernel: Kernel) -> None:
    import ipykernel

    if ipykernel.version_info[0] < 7:
        pytest.skip("subshells came with ipykernel 7")
    client = kernel.client
    control = client.session.msg("create_subshell_request")
    client.control_channel.send(control)
    subshell = client.get_control_msg(timeout=10)["content"]["subshell_id"]
    client.execute("%%ddp --cpus 2\nimport time\ntime.sleep(3)")
    ask = client.session.msg("execute_request", {"code": "%ddp status", "silent": False, "store_history": False})
    ask["header"]["subshell_id"] = subshell
    text = ""
    while "rank 1  running, line 3" not in text:
        time.sleep(0.3)
        client.shell_channel.send(ask)
        while (message := client.get_iopub_msg(timeout=10))["content"].get("execution_state") != "idle" or (
            message["parent_header"]["msg_id"] != ask["header"]["msg_id"]
        ):
            if message["msg_type"] == "stream":
                text += message["content"]["text"]
        ask = client.session.msg("execute_request", ask["content"])
        ask["header"]["subshell_id"] = subshell
    assert re.search(r"nbddp: 2 ranks, \d s", text)
    kernel.wait_idle()


def test_settings_that_cannot_be(kernel: Kernel) -> None:
    for wrong in ("output = -5", "displays = -1", "grace = -1", "large = -1"):
        assert "should not be less than" in kernel.run(f"%config DDPMagics.{wrong}").raw


def test_an_optimizer_that_is_left_behind_is_named(kernel: Kernel) -> None:
    kernel.ok("import torch\nnet = torch.nn.Linear(2, 2)\nopt = torch.optim.SGD(net.parameters(), 0.1)")
    reply = kernel.ok("%%ddp --cpus 1 --out net\nopt.step()\nnet")
    assert reply.text == (
        "nbddp: opt still holds the parameters that net had before; what is to come back as one goes into one "
        "--out: net,opt\n"
    )
    kernel.ok("opt = torch.optim.SGD(net.parameters(), 0.1)")
    # A name of --gather cannot stand behind --out as well.
    reply = kernel.ok("%%ddp --cpus 1 --out net --gather steps\nopt.step()\nsteps = 1\nnet")
    assert reply.text.endswith(" goes into one --out: net,opt\n")
    kernel.ok("opt = torch.optim.SGD(net.parameters(), 0.1)")
    assert kernel.ok("%%ddp --cpus 1 --out net,opt\nopt.step()\nnet").text == ""


def test_ranks_that_are_shown(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 3 --ranks 0,2\nprint('mine', rank)\nrank")
    assert reply.lines == ["[rank 0] mine 0", "[rank 2] 2", "[rank 2] mine 2"]
    assert reply.value is not None
    assert reply.value["text/plain"] == "0"
    assert kernel.ok("%ddp log --rank 1").text == "mine 1\n"
    assert kernel.ok("%%ddp --cpus 2 --ranks 1\nrank").value == {"text/plain": "1"}
    assert kernel.run("%%ddp --cpus 2 --ranks 2\n1").message == "--ranks 2: this run has ranks 0 to 1"
    for wrong in ("-1", "''", "x"):
        assert "--ranks" in kernel.run(f"%%ddp --cpus 2 --ranks {wrong}\n1").stderr


def test_logs(kernel: Kernel, tmp_path: Path) -> None:
    kernel.ok("%%ddp --cpus 2\nfor i in range(100): print(rank, i)")
    assert kernel.ok("%ddp log --rank 1 --tail 2").text == "1 98\n1 99\n"
    assert kernel.ok("%ddp log 0").text.splitlines() == [f"0 {i}" for i in range(100)]
    both = kernel.ok("%ddp log --tail 1").text.splitlines()
    assert both[1::2] == ["0 99", "1 99"]
    assert kernel.ok(f"%ddp log --save '{tmp_path}/a folder'").text.startswith("2 logs saved: ")
    assert (tmp_path / "a folder" / "rank1.log").read_text().splitlines()[-1] == "1 99"
    kernel.ok(f"%ddp log --rank 0 --save {tmp_path}/one.txt")
    assert (tmp_path / "one.txt").read_text().startswith("0 0\n")
    assert "No such file" in kernel.run(f"%ddp log --rank 0 --save {tmp_path}/no/one.txt").message
    for wrong in ("--tail 0", "--tail x", "--wrong", "0 --rank 1"):
        assert "UsageError: %ddp log" in kernel.run(f"%ddp log {wrong}").stderr
