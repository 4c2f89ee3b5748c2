"""`nbddp.launch` and %%ddp are two skins over the same run: the same results, errors and refusals."""

from __future__ import annotations

import re
import textwrap

import pytest

from tests.kernel import Kernel

SETUP = (
    "import nbddp, torch, torch.distributed as dist, threading\nscale = 3\n"
    "class Point:\n    def __init__(self, x):\n        self.x = x\n"
    "    def __eq__(self, other):\n        return self.x == other.x\n"
    "def equal(a, b):\n    return type(a) is type(b) and (torch.equal(a, b) if torch.is_tensor(a) else a == b)\n"
    "weights = torch.arange(4.0)\nlock = threading.Lock()\n"
)

# Bodies that bind `result`.
RESULTS = [
    "result = dist.get_rank() * scale",
    "result = weights * (dist.get_rank() + 1)",
    "result = Point(dist.get_rank())",
    "t = torch.ones(1)\ndist.all_reduce(t)\nresult = t.item(), dist.get_backend(), dist.get_world_size()",
    "import asyncio\nresult = [type(Point(1)).__module__, Point.__name__, __name__]",
]
ERRORS = [
    "result = 1 / (dist.get_rank() - 1) if dist.get_rank() else dist.barrier()",
    "import os\nresult = os._exit(7) if dist.get_rank() else dist.barrier()",
    "import sys\nresult = sys.exit(3) if dist.get_rank() else dist.barrier()",
    "result = lock",
    "result = (i for i in range(3))",
]
REFUSALS = [
    ("--cpus 0", "cpus=0"),
    ("--cpus 2 --gpus 2", "cpus=2, gpus=2"),
    ("--gpu-ids 1,1", "gpu_ids=[1, 1]"),
    ("--cpus 2 --timeout -1", "cpus=2, timeout=-1.0"),
    ("--cpus 2 --max-restarts -1", "cpus=2, max_restarts=-1"),
    ("--cpus 2 --env RANK=1", "cpus=2, env={'RANK': '1'}"),
    ("--cpus 2 --backend nonsense", "cpus=2, backend='nonsense'"),
    ("--cpus 2 --backend nccl", "cpus=2, backend='nccl'"),
    ("--cpus 2 --ranks 5", "cpus=2, ranks=[5]"),
    ("--cpus 2 --nnodes 2 --node-rank 1", "cpus=2, nnodes=2, node_rank=1"),
    ("--cpus 2 --hosts a,b --nnodes 3", "cpus=2, hosts=['a', 'b'], nnodes=3"),
    ("--cpus 2 --keep-script /no/folder/x.py", "cpus=2, keep_script='/no/folder/x.py'"),
    ("--gpu-ids 5", "gpu_ids=[5]"),
    ("", ""),
]


def cell(body: str) -> str:
    return f"%%ddp --cpus 2 --gather result\n{body}"


def call(body: str) -> str:
    function = f"def function():\n{textwrap.indent(body, '    ')}\n    return result\n"
    return f"{function}called = nbddp.launch(function, cpus=2)"


@pytest.mark.parametrize("body", RESULTS)
def test_results(kernel: Kernel, body: str) -> None:
    kernel.ok(SETUP)
    kernel.ok(cell(body))
    kernel.ok(call(body))
    assert kernel.get("len(called), len(result), [equal(*pair) for pair in zip(called, result)]") == (2, 2, [True] * 2)


@pytest.mark.parametrize("body", ERRORS)
def test_errors(kernel: Kernel, body: str) -> None:
    kernel.ok(SETUP)
    first, second = kernel.run(cell(body)), kernel.run(call(body))
    assert (first.status, first.error) == ("error", second.error)
    # What is the cell of the one is the function of the other; and what is asked for has a name only there.
    either = (
        r"--gather result: |,? (used on line \d+ of the cell|which function function uses),?|\. Nothing was assigned"
    )

    def told(message: str) -> str:
        return re.sub(either, "", message).replace("'return value'", "'result'").replace("the function", "the cell")

    assert told(first.message) == told(second.message)
    ends = [reply.traceback.rsplit("\n\n", 1)[-1] for reply in (first, second)]
    if first.error not in ("CaptureError", "ResultError"):
        assert ends[0] == ends[1]


@pytest.mark.parametrize(("line", "keywords"), REFUSALS)
def test_refusals(kernel: Kernel, line: str, keywords: str) -> None:
    kernel.ok(SETUP)
    first = kernel.run(f"%%ddp {line}\nprint('ran')")
    second = kernel.run(f"nbddp.launch(print, 'ran', {keywords})")
    assert "ran" not in first.text.split()
    assert "ran" not in second.text.split()
    # What a magic refuses is shown in IPython's own way, a line on stderr.
    assert second.message
    assert (first.message or first.stderr.removeprefix("UsageError: ").rstrip("\n")) == second.message
    assert "Traceback" not in second.traceback
