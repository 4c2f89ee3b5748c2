"""The fault matrix: what goes wrong, what the notebook then shows, and how it is brought about. See docs/faults.md."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        group: The table's section.
        name: What goes wrong.
        cell: The cell's body; ``N`` ranks run it.
        shows: Patterns of lines that the notebook shows, all of them, in any order; what the table quotes.
        error: The name of the exception in the notebook; empty if there is none.
        setup: A cell before.
        act: What is done: "interrupt", "interrupt twice", or nothing.
        when: ... once this text is shown; a number of seconds after the request instead, if it is one.
        checks: An expression that must be true in the notebook afterwards.
        options: Options of %%ddp.
        grace: The grace period, in seconds.
        within: Seconds from the act, or from the request, until the prompt is back; generous, for loaded machines.
    """

    group: str
    name: str
    cell: str
    shows: tuple[str, ...]
    error: str = "KeyboardInterrupt"
    setup: str = ""
    act: str = "interrupt"
    when: str | float = "up"
    checks: str = ""
    options: str = ""
    grace: float = 5.0
    within: float = 6.0
    ranks: tuple[int, ...] = field(default=(2, 4))


UP = "import time\nprint('up', flush=True)\n"
INTERRUPTED = r"KeyboardInterrupt: the run was interrupted"
TERMINATED = r"nbddp: ranks that did not end are terminated"
ALL = r"ranks? [-0-9, ]+: "

INTERRUPTS = [
    Fault(
        "Interrupt", "while the cell's values are pickled", "print(slow)",
        (r"KeyboardInterrupt: interrupted while what the cell uses was pickled; nothing was launched",),
        setup="import time\nclass Slow:\n    def __reduce__(self):\n        time.sleep(30)\n        return int, ()\nslow = Slow()",
        when=1.0,
    ),
    Fault("Interrupt", "in time.sleep", UP + "time.sleep(60)", (ALL + r"on line 4 of the cell: time\.sleep\(60\)", INTERRUPTED)),
    Fault(
        "Interrupt", "in a Python loop", UP + "while True:\n    pass", (ALL + r"on line [45] of the cell: .*", INTERRUPTED),
    ),
    Fault(
        "Interrupt", "in an import", UP + "import slow_module",
        (ALL + r"in wait on line 3 of slow_module\.py \(called on line 4 of the cell\)", INTERRUPTED),
        setup="import os, sys\nopen('slow_module.py', 'w').write('import time\\ndef wait():\\n    time.sleep(60)\\nwait()\\n')\n"
        "sys.path.insert(0, os.getcwd())",
    ),
    Fault(
        "Interrupt", "in a collective in which one rank is missing",
        UP + "if rank == 1:\n    time.sleep(60)\ndist.barrier()",
        (r"ranks? 0(, 2-3)?: waiting in barrier on line 6 of the cell: dist\.barrier\(\)",
         r"rank 1: on line 5 of the cell: time\.sleep\(60\)", INTERRUPTED),
        setup="import torch.distributed as dist",
    ),
    Fault(
        "Interrupt", "while a C extension holds the GIL", UP + "sum(range(10 ** 13))",
        (ALL + r"on line 4 of the cell: sum\(range\(10 \*\* 13\)\)", TERMINATED, INTERRUPTED), grace=0.5,
    ),
    Fault(
        "Interrupt", "the cell catches KeyboardInterrupt and saves a checkpoint",
        UP + "import torch\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    time.sleep(0.5)\n"
        "    torch.save({'rank': rank}, f'checkpoint.{rank}')\n    print('saved')",
        (r"\[rank 1\] saved",), error="",
        checks="__import__('torch').load('checkpoint.1') == {'rank': 1}",
    ),
    Fault(
        "Interrupt", "ranks ignore SIGINT",
        UP.replace("print", "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint") + "time.sleep(60)",
        (ALL + r"on line 6 of the cell: time\.sleep\(60\)", TERMINATED, INTERRUPTED), grace=0.5,
    ),
    Fault(
        "Interrupt", "ranks ignore SIGINT and SIGTERM",
        "import signal\nfor s in (signal.SIGINT, signal.SIGTERM):\n    signal.signal(s, signal.SIG_IGN)\n" + UP + "time.sleep(60)",
        (TERMINATED, r"nbddp: not every rank ended by itself; those that did not were killed", INTERRUPTED), grace=0.5,
    ),
    Fault(
        "Interrupt", "twice in a row", "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + UP + "time.sleep(60)",
        (r"nbddp: not every rank ended by itself; those that did not were killed", INTERRUPTED), act="interrupt twice",
    ),
    Fault(
        "Interrupt", "while ranks write their results", UP + "x = Slow()", (INTERRUPTED,), options="--out x",
        setup="import time\nclass Slow:\n    def __reduce__(self):\n        time.sleep(30)\n        return int, ()",
        checks="'x' not in dir()",
    ),
    Fault(
        "Interrupt", "while the notebook loads results", UP + "x = Slow()",
        (r"KeyboardInterrupt: interrupted while the results were loaded; nothing was assigned",), options="--out x",
        setup="import os, time\nhere = os.getpid()\nclass Slow:\n    def __init__(self):\n        self.a = 1\n"
        "    def __setstate__(self, state):\n        if os.getpid() == here:\n            time.sleep(30)",
        when=3.0, checks="'x' not in dir()",
    ),
    Fault(
        "Interrupt", "while exit handlers run",
        "import atexit, time\natexit.register(lambda: (print('up', flush=True), time.sleep(60)))\nx = 5",
        (r"\(rank 1\) KeyboardInterrupt: ?",), error="", options="--out x", checks="x == 5",
    ),
]  # fmt: skip

FIRST = "if rank == 1:\n    {}\ntime.sleep(60)"


def _one_fails(name: str, statement: str, shows: tuple[str, ...], error: str, **more: object) -> Fault:
    cell = "import os, time\n" + FIRST.format(statement)
    return Fault("Ranks", name, cell, shows, error, act="", when="", **more)  # type: ignore[arg-type]


OTHERS = r"ranks? 0(, 2-3)?: stopped"

RANKS = [
    _one_fails("an exception on one rank", "raise ValueError('bad')",
               (r"ValueError: bad", r"rank 1 of \d raised this", OTHERS), "ValueError"),
    Fault("Ranks", "an exception on each, with messages of their own", "raise ValueError(f'mine {rank}')",
          (r"ValueError: mine \d", r"rank \d of \d raised this", r"rank \d: ValueError: mine \d.*"), "ValueError", act="", when=""),
    Fault("Ranks", "an exception in a DataLoader worker",
          "for batch in torch.utils.data.DataLoader(Data(), num_workers=2):\n    pass",
          (r"ValueError: Caught ValueError in DataLoader worker process [01]\.", r"ValueError: item 3", r"rank \d of \d raised this"),
          "ValueError", act="", when="",
          setup="import torch\nclass Data(torch.utils.data.Dataset):\n    def __len__(self): return 8\n"
          "    def __getitem__(self, i):\n        if i == 3:\n            raise ValueError('item 3')\n        return i"),
    Fault("Ranks", "an exception in a backward hook",
          "x = torch.ones(1, requires_grad=True)\nx.register_hook(lambda g: g if rank != 1 else g / (1 // 0))\n(x * 2).backward()\nimport time; time.sleep(60)",
          (r"ZeroDivisionError: integer division or modulo by zero", r"rank 1 of \d raised this"), "ZeroDivisionError", act="", when="",
          setup="import torch"),
    Fault("Ranks", "an exception in __del__", "class D:\n    def __del__(self):\n        1 / 0\nD()\nprint('went on')",
          (r"\(rank 1\) Exception ignored in: .*", r"\(rank 1\) ZeroDivisionError: division by zero", r"\[rank 1\] went on"), "", act="", when=""),
    Fault("Ranks", "an exception in an exit handler", "import atexit\natexit.register(lambda: 1 / 0)\nprint('went on')",
          (r".*ZeroDivisionError: division by zero", r"\[rank 1\] went on"), "", act="", when=""),
    _one_fails("an exception that cannot be pickled", "import threading; e = ValueError('locked'); e.lock = threading.Lock(); raise e",
               (r"ValueError: locked", r"rank 1 of \d raised this"), "ValueError"),
    _one_fails("an exception whose __str__ raises", "raise Mute", (r"rank 1 of \d raised this",), "Mute",
               setup="class Mute(Exception):\n    def __str__(self): raise RuntimeError"),
    _one_fails("an ExceptionGroup", "raise ExceptionGroup('two', [ValueError('a'), KeyError('b')])",
               (r"RankError: rank 1 of \d raised ExceptionGroup: two \(2 sub-exceptions\)", r" *\| ValueError: a"), "RankError",
               checks="isinstance(__import__('sys').last_value.original, ExceptionGroup)"),
    _one_fails("a KeyboardInterrupt of the cell's own", "raise KeyboardInterrupt",
               (r"RankError: rank 1 of \d was interrupted, but not by this notebook",), "RankError"),
    _one_fails("sys.exit(3) on one rank", "raise SystemExit(3)", (r"RankError: rank 1 of \d exited with status 3 \(sys\.exit\)", OTHERS),
               "RankError"),
    Fault("Ranks", "sys.exit(0) on one rank while others wait for it", "if rank == 1:\n    raise SystemExit(0)\ndist.all_reduce(torch.ones(1))",
          (r"RuntimeError: .*", r"It waited for rank 1, which had finished: every rank must call the same collectives.*"), "RuntimeError",
          act="", when="", setup="import torch, torch.distributed as dist"),
    _one_fails("recursion to the limit", "deep()", (r"RecursionError: maximum recursion depth exceeded.*", r"rank 1 of \d raised this",
                r"\(\d+ frames in between are not shown\)"),
               "RecursionError", setup="def deep(): deep()"),
    _one_fails("a segmentation fault", "import ctypes; ctypes.string_at(0)",
               (r"RankError: rank 1 of \d was killed by signal 11 \(SIGSEGV\)", r"Fatal Python error: Segmentation fault",
                r"rank 1: in string_at \(__init__\.py\) on line 4 of the cell: .*", OTHERS), "RankError"),
    _one_fails("os.abort()", "os.abort()", (r"RankError: rank 1 of \d was killed by signal 6 \(SIGABRT\)",
               r"rank 1: on line 4 of the cell: os\.abort\(\)"), "RankError"),
    _one_fails("SIGKILL", "os.kill(os.getpid(), 9)", (r"RankError: rank 1 of \d was killed by signal 9 \(SIGKILL\)", OTHERS), "RankError"),
    _one_fails("os._exit(0) before the end", "os._exit(0)", (r"RankError: rank 1 of \d left .*before the end of the cell", OTHERS), "RankError"),
    _one_fails("no memory left: the allocation fails", "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (64 << 30, -1)); torch.ones(1 << 36)",
               (r"RuntimeError: .*can't allocate memory: .*", r"rank 1 of \d raised this", r"Less data per rank, .*"), "RuntimeError"),
    Fault("Ranks", "one never comes to the collective, with --timeout", "import time\nif rank == 1:\n    time.sleep(60)\ndist.barrier()",
          (r"RunTimeout: the run was stopped after --timeout 3 seconds",
           r"ranks? 0(, 2-3)?: waiting in barrier on line 5 of the cell: dist\.barrier\(\)", r"rank 1: on line 4 of the cell: time\.sleep\(60\)"),
          "RunTimeout", act="", when="", options="--timeout 3", setup="import torch.distributed as dist", within=9),
    Fault("Ranks", "one dies once, with --max-restarts 2, and goes on from its checkpoint",
          "import os, torch\nattempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
          "start = torch.load('state.pt') if os.path.exists('state.pt') else 0\ndist.barrier()\n"
          "for step in range(start, 6):\n    if rank == 0:\n        torch.save(step, 'state.pt')\n    dist.barrier()\n"
          "    if step == 3 and rank == 1 and attempt == 0:\n        os.kill(os.getpid(), 9)\n"
          "    dist.barrier()\nprint('attempt', attempt, 'from', start)",
          (r"nbddp: rank 1 failed \(was killed by signal 9 \(SIGKILL\)\); restart 1 of 2", r"\[rank 0\] attempt 1 from 3"), "",
          act="", when="", options="--max-restarts 2", setup="import torch.distributed as dist", within=20),
]  # fmt: skip

ROWS = [*INTERRUPTS, *RANKS]
