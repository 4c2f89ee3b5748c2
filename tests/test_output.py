"""What ranks print and display, as the notebook shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nbddp._relay import TEXT_LIMIT
from tests.kernel import Kernel


def test_both_streams_and_child_processes_are_heard_in_order(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport sys, os, subprocess\nprint('1 out')\nprint('2 err', file=sys.stderr)\n"
        "sys.stdout.flush(); os.write(1, b'3 raw\\n')\nsubprocess.run(['echo', '4 child'])\n"
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.puts(b'5 C')\n"
    )
    assert reply.text.splitlines() == [f"{text}" for text in ("1 out", "2 err", "3 raw", "4 child", "5 C")]
    assert reply.stderr == ""


def test_output_is_live(kernel: Kernel) -> None:
    seen: list[float] = []
    import time

    began = time.monotonic()
    kernel.run_and(
        "%%ddp --cpus 1\nimport time\nprint('early')\ntime.sleep(2)",
        "early",
        lambda: seen.append(time.monotonic() - began),
    )
    assert seen[0] < 1.5


def test_a_million_lines(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2\nif rank == 0:\n    for i in range(1_000_000):\n"
        "        print('line', i)\nelse:\n    print('quiet')"
    )
    lines = reply.text.splitlines()
    assert lines[:1] in (["[rank 0] line 0"], ["[rank 1] quiet"])
    assert "[rank 1] quiet" in lines
    assert "[rank 0] line 999999" in lines
    notice = next(line for line in lines if line.startswith("…"))
    assert notice.endswith("of rank 0 not shown; %ddp log --rank 0")
    shown = sum(line.startswith("[rank 0]") for line in lines)
    hidden = int(notice.split()[1].replace(",", ""))
    assert shown + hidden == 1_000_000
    assert len(reply.text) < 2 * TEXT_LIMIT
    assert kernel.ok("%ddp log --rank 1").text == "quiet\n"
    kernel.ok("with open(__import__('nbddp')._function.client.session.logs + '/rank0.log') as f: log = f.read()")
    assert kernel.get("log.count('\\n'), log[:7], log[-12:]") == (1_000_000, "line 0\n", "line 999999\n")


def test_invalid_utf8_and_no_final_newline(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 1\nimport os\nos.write(1, b'caf\\xc3\\xa9 \\xff\\xfe end')")
    assert reply.text == "café \ufffd\ufffd end\n"


def test_a_character_split_between_writes(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport os, time\nos.write(1, b'caf\\xc3')\ntime.sleep(0.3)\nos.write(1, b'\\xa9 ok\\n')"
    )
    assert reply.text == "café ok\n"


def test_a_lone_surrogate_can_be_printed(kernel: Kernel) -> None:
    assert kernel.ok("%%ddp --cpus 1\nprint('\\ud800 x')").text == "\\ud800 x\n"


def test_of_a_progress_bar_the_last_state_remains(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2\nimport sys\nfor i in range(101):\n"
        "    sys.stderr.write(f'\\r{i:3}% |{\"#\" * (i // 10):10}|')\n"
        "sys.stderr.write('\\n')"
    )
    assert reply.lines == ["(rank 0) 100% |##########|", "(rank 1) 100% |##########|"]


def test_displays_keep_their_place(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nfrom IPython.display import display, HTML\nprint('before')\ndisplay(HTML('<b>one</b>'))\n"
        "print('between', end='')\ndisplay(HTML('<b>two</b>'))\nprint('after')"
    )
    shown = [c.get("text") or c["data"]["text/html"] for k, c in reply.outputs if k in ("stream", "display_data")]
    assert shown == ["before\n", "<b>one</b>", "between\n", "<b>two</b>", "after\n"]


def test_displays_of_several_ranks_say_whose_they_are(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2\nfrom IPython.display import display, HTML\n"
        "display(HTML(f'<b>{rank}</b>'))\ndisplay({'r': rank})"
    )
    assert sorted(bundle["text/html"] for bundle in reply.displays) == ["<b>0</b>", "<b>1</b>"]
    assert "[rank 0] {'r': 0}" in reply.lines
    assert "[rank 1]" in reply.lines  # above the picture; as text there is nothing to say


def test_updating_a_display(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nfrom IPython.display import display, HTML\nimport time\n"
        # What is not shown yet is shown in its last state.
        "h = display(HTML('a'), display_id=True)\ntime.sleep(0.5)\nh.update(HTML('b'))"
    )
    kinds = [(kind, c["data"]["text/html"]) for kind, c in reply.outputs if "display_data" in kind]
    assert kinds == [("display_data", "a"), ("update_display_data", "b")]


def test_plots(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 1\nimport matplotlib.pyplot as plt\nplt.plot([1, 2, 3])\nplt.show()\nprint('done')")
    assert len(reply.displays) == 1
    assert reply.displays[0]["image/png"].startswith("iVBOR")
    assert reply.text == "done\n"


def test_plots_look_like_the_notebooks(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok(
        "%matplotlib inline\nimport matplotlib, matplotlib.pyplot as plt\nplt.rcParams['figure.figsize'] = (3, 2)\n"
        "plt.rcParams['axes.prop_cycle'] = matplotlib.cycler(color=['r', 'g'])\n"
        "%config InlineBackend.figure_formats = ['svg']\nbefore = dict(plt.rcParams)"
    )
    reply = kernel.ok(
        "%%ddp --cpus 2\nimport sys\nassert 'matplotlib' not in sys.modules\nfrom matplotlib import pyplot\n"
        "assert pyplot.rcParams['figure.figsize'] == [3, 2] and 'plot settings' not in globals()\n"
        "assert pyplot.rcParams['axes.prop_cycle'].by_key() == {'color': ['r', 'g']}\n"
        "pyplot.plot([1, 2])\npyplot.show()"
    )
    assert [sorted(set(bundle) - {"text/plain"}) for bundle in reply.displays] == [["image/svg+xml"]] * 2
    # A common way to choose colours: arrays, of which the default has others in number.
    kernel.ok("plt.rcParams['axes.prop_cycle'] = matplotlib.cycler(color=plt.cm.viridis([i / 10 for i in range(10)]))")
    kernel.ok("%%ddp --cpus 1\nassert len(plt.rcParams['axes.prop_cycle']) == 10")
    # Nobody has asked for them to be sent.
    kernel.ok("import threading\nclass Odd(list): pass\nodd = Odd()\nodd.lock = threading.Lock()")
    kernel.ok("dict.__setitem__(plt.rcParams, 'path.effects', odd)\nodd.append(1)")
    kernel.ok("%%ddp --cpus 1\nimport matplotlib.pyplot")
    kernel.ok("plt.rcdefaults()\n%matplotlib inline")
    kernel.ok("%%ddp --cpus 1\nassert plt.rcParams['axes.prop_cycle'].by_key()['color'][0] != 'r'")


def test_a_widget_in_a_rank_gets_a_sentence(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2\nimport ipywidgets\nfrom tqdm.notebook import tqdm\ndisplay(ipywidgets.IntSlider())\n"
        "for _ in tqdm(range(2)): pass\nipywidgets.HBox([])"
    )
    assert reply.lines == [
        text
        for r in range(2)
        for text in (
            f"[rank {r}] nbddp: IntSlider is a widget, and works only in the notebook's own process",
            f"[rank {r}] nbddp: tqdm.notebook draws widgets, which work only in the notebook's own process; "
            "from tqdm.auto import tqdm draws its bar as text",
        )
    ]
    assert reply.value is not None
    assert reply.value["text/plain"].startswith("nbddp: HBox is a widget,")


def test_bundles_of_any_type_arrive_as_they_are(kernel: Kernel) -> None:
    plot = {"application/vnd.plotly.v1+json": {"data": [{"y": [1, 2.5, None]}], "layout": {}}, "text/plain": "a plot"}
    kernel.ok(f"plot = {plot!r}")
    reply = kernel.ok("%%ddp --cpus 2\nif rank == 1:\n    display(plot, raw=True, metadata={'text/plain': {'a': 1}})")
    assert reply.displays == [plot]
    assert reply.text == "[rank 1]\n"


def test_clearing_the_output(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2\nfrom IPython.display import clear_output\nimport torch.distributed as dist\n"
        "print('old', rank)\n"
        "dist.barrier()\nif rank == 0:\n    clear_output(wait=True)\n    print('new')"
    )
    kinds = [kind for kind, _ in reply.outputs]
    assert "clear_output" in kinds
    after = "".join(c["text"] for kind, c in reply.outputs[kinds.index("clear_output") :] if kind == "stream")
    assert "old 0" not in after
    assert "old 1" in after
    assert "new" in after


def test_a_figure_left_open_is_shown_at_the_end(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 1\n%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    assert len(reply.displays) == 1


def test_capture_magic_takes_the_output(kernel: Kernel) -> None:
    kernel.ok("%%capture caught\nget_ipython().run_cell_magic('ddp', '--cpus 1', 'print(5)')")
    assert kernel.get("caught.stdout") == "5\n"


def test_exit_handlers_are_run_and_heard(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport atexit, threading, time\natexit.register(print, 'handler')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\nprint('cell')"
    )
    assert reply.text.splitlines() == ["cell", "thread", "handler"]


def test_descriptors_closed_by_the_cell_do_not_hang_it(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport os, sys\nprint('seen')\nsys.stdout.flush()\nos.close(1)\nos.close(2)", timeout=20
    )
    assert reply.text == "seen\n"


def test_logs_of_ranks_that_were_not_there(kernel: Kernel) -> None:
    kernel.ok("%%ddp --cpus 1\nprint(1)")
    assert "the last run had ranks 0 to 0" in kernel.run("%ddp log 4").message


def test_a_long_text_display_is_no_end(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 2\nif rank == 0:\n    display('x' * 900_000)\nprint('after')")
    assert reply.lines[-2:] == ["[rank 0] after", "[rank 1] after"] or "after" in reply.text
    assert reply.seconds < 30


def test_numbers_without_end_do_not_hold_up_the_panel(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2\nimport time\nnumbers = ','.join(map(str, range(16000)))\n"
        "for i in range(6):\n    print(numbers, end='', flush=True)\n"
        "    time.sleep(0.3)\n    print()",
        timeout=30,
    )
    assert reply.panels


def test_values_do_not_hold_up_threads(kernel: Kernel) -> None:
    import time

    began, seen = time.monotonic(), []
    kernel.run_and(
        "%%ddp --cpus 1\nimport threading, time\ndef later():\n    for i in range(8):\n        time.sleep(0.5)\n"
        "        print('thread', i)\nthreading.Thread(target=later).start()\n'value'",
        "thread 1",
        lambda: seen.append(time.monotonic() - began),
    )
    assert seen[0] < 3


def test_a_display_in_a_forked_child_is_its_text(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport os\nfrom IPython.display import HTML, display\nif (pid := os.fork()) == 0:\n"
        "    display(HTML('<b>child</b>'))\n    import sys; sys.stdout.flush()\n    os._exit(0)\nos.waitpid(pid, 0)\n"
        "display(HTML('<b>parent</b>'))\nprint('after')"
    )
    assert reply.text == "<IPython.core.display.HTML object>\nafter\n"
    assert reply.displays == [{"text/html": "<b>parent</b>", "text/plain": "<IPython.core.display.HTML object>"}]


def test_a_display_while_stdout_goes_to_a_file(kernel: Kernel, tmp_path: Path) -> None:
    kernel.ok(
        f"%%ddp --cpus 1\nimport os\nfd = os.open({str(tmp_path / 'out')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "old = os.dup(1)\nos.dup2(fd, 1)\nprint('to file')\ndisplay('shown')\nos.dup2(old, 1)"
    )
    assert (tmp_path / "out").read_bytes() == b"to file\n"


def test_streams_have_the_names_that_an_interpreter_gives_them(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2 --ranks 0\nimport sys, logging\n"
        "print(sys.stdout.name, sys.stderr.name, sys.stdout.mode, sys.stderr.mode)\n"
        "logging.getLogger('torch._dynamo').warning('careful')"
    )
    assert reply.text.splitlines()[0] == "[rank 0] <stdout> <stderr> w w"
    assert reply.text.splitlines()[1].startswith("(rank 0) ")
    assert "careful" in reply.text


def test_a_restart_begins_anew(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2 --max-restarts 1 --ranks 0\nimport os, time\n"
        "attempt = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "print('\\x1b[?25lhalf', attempt, end='', flush=True)\n"
        "if attempt == '0':\n    time.sleep(0.5)\n    os._exit(3)\n"
        "print('\\x1b[?25h')\nprint('attempt', attempt)"
    )
    lines = [line for line in reply.text.splitlines() if not line.startswith("nbddp:")]
    assert lines == ["[rank 0] half 0", "[rank 0] half 1", "[rank 0] attempt 1"]


def test_input_is_at_its_end(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 1\ninput()")
    assert reply.error == "EOFError"
