"""What comes back: from rank 0, from every rank, to a device; all of it or nothing, and then the rest is not lost."""

from __future__ import annotations

import pytest

from tests.kernel import Kernel


def test_a_list_by_rank_beside_a_name_from_rank_0(kernel: Kernel) -> None:
    kernel.ok("%%ddp --cpus 3 --gather mine,both --out only\nmine, only, both = rank * 10, rank, [rank]")
    assert kernel.get("mine, only, both") == ([0, 10, 20], 0, [[0], [1], [2]])


def test_what_is_shared_between_results_stays_shared(kernel: Kernel) -> None:
    kernel.ok("import torch\nnet = torch.nn.Linear(2, 2)")
    kernel.ok(
        "%%ddp --cpus 2 --out net,optimizer --gather weights\nweights = net.weight\n"
        "optimizer = torch.optim.SGD(net.parameters(), lr=1)"
    )
    assert kernel.get("optimizer.param_groups[0]['params'][0] is net.weight is weights[0], len(weights)") == (True, 2)


def test_results_can_be_written_to(kernel: Kernel) -> None:
    kernel.ok("%%ddp --cpus 1 --out t,a\nimport torch, numpy\nt, a = torch.zeros(1 << 20), numpy.zeros(1 << 20)")
    kernel.ok("t += 1\na += 1")
    assert kernel.get("t.sum().item(), float(a.sum())") == (1 << 20, 1 << 20)


def test_a_result_lives_on_after_its_file_and_can_go_again(kernel: Kernel) -> None:
    kernel.ok("%%ddp --cpus 1 --out t\nimport torch\nt = torch.ones(1 << 20)")
    kernel.ok("%%ddp --cpus 2 --out t\nt = t * 2")
    assert kernel.get("t.sum().item()") == 2 << 20


def test_names_of_the_notebook_that_the_cell_only_takes(kernel: Kernel) -> None:
    kernel.ok("seen = [1]")
    kernel.ok("%%ddp --cpus 2 --gather seen\nseen.append(rank)")
    assert kernel.get("seen") == [[1, 0], [1, 1]]


def test_tensors_are_put_on_a_device(kernel: Kernel) -> None:
    kernel.ok("import torch\nnet = torch.nn.Linear(2, 2)")
    kernel.ok("%%ddp --cpus 1 --out net --out-device meta\nnet.weight.data += 1")
    assert kernel.get("net.weight.device.type, tuple(net.weight.shape)") == ("meta", (2, 2))
    reply = kernel.run("%%ddp --cpus 1 --out net --out-device cuda:1\nnet\nprint('ran')")
    assert reply.error == "LaunchError"
    assert reply.message == "--out-device cuda:1: there are no GPUs here"
    assert "ran" not in reply.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--out a --gather a", "--out and --gather both bring back a"),
        ("--gather 5", "--gather 5: that is no name"),
        ("--out a --out-device gpu", "--out-device gpu: that is no device, such as cpu or cuda:0"),
        ("--out-device cpu", "--out-device says where results are put"),
        ("--gather zz", "--gather zz: the cell never binds 'zz'"),
    ],
)
def test_what_cannot_be(kernel: Kernel, line: str, message: str) -> None:
    assert message in kernel.run(f"%%ddp --cpus 1 {line}\na = 1").text


def test_missing_on_one_rank(kernel: Kernel) -> None:
    kernel.ok("a, b = 'old', 'old'")
    reply = kernel.run("%%ddp --cpus 3 --gather c,b\nb = rank\nif rank != 1:\n    c = rank")
    assert reply.error == "ResultError"
    assert reply.message == (
        "--gather c,b: the cell did not bind 'c' on rank 1. Nothing was assigned; %ddp results has the rest: c, b"
    )
    assert kernel.get("a, b") == ("old", "old")
    assert kernel.get("get_ipython().run_line_magic('ddp', 'results')") == {"c": {0: 0, 2: 2}, "b": [0, 1, 2]}


def test_what_some_ranks_have_is_not_lost(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 3 --gather c\nif rank != 1:\n    c = rank")
    assert "did not bind 'c' on rank 1. Nothing was assigned; %ddp results has the rest: c" in reply.message
    assert kernel.get("get_ipython().run_line_magic('ddp', 'results')") == {"c": {0: 0, 2: 2}}
    kernel.ok(
        "import nbddp, threading\ndef f():\n    import os\n"
        "    return threading.Lock() if os.environ['RANK'] == '1' else os.environ['RANK']\n"
        "try:\n    nbddp.launch(f, cpus=3)\nexcept nbddp.ResultError as error:\n    found = error.results"
    )
    assert kernel.get("found") == {0: "0", 2: "2"}


def test_a_shard_does_not_come_back_as_the_whole(kernel: Kernel) -> None:
    kernel.ok("import torch\nnet = torch.nn.Linear(4, 4, bias=False)")
    kernel.ok(
        "def shard():\n    from torch.distributed.device_mesh import init_device_mesh\n"
        "    from torch.distributed.fsdp import fully_shard\n"
        "    return fully_shard(net, mesh=init_device_mesh('cpu', (2,)))"
    )
    reply = kernel.run(
        "%%ddp --cpus 2 --out net,state,whole\nnet = shard()\nstate, whole = net.state_dict(), net.weight.full_tensor()"
    )
    assert reply.error == "ResultError"
    assert "cannot bring back 'net' (torch.distributed.fsdp." in reply.message
    assert "FSDPLinear): each rank has only its shards of the parameters. get_model_state_dict(" in reply.message
    assert (
        "cannot bring back 'state['weight']' (torch.distributed.tensor.DTensor): each rank has only its shard of it. "
        "Its full_tensor(), called on every rank, is the whole tensor" in reply.message
    )
    assert "%ddp results has the rest: whole" in reply.message
    assert kernel.get("get_ipython().run_line_magic('ddp', 'results')['whole'].shape == (4, 4)")


def test_the_snapshot_is_not_kept(kernel: Kernel) -> None:
    kernel.ok("import numpy as np, gc\na = np.ones((1 << 12, 1 << 12))[:, ::2]")
    kernel.run("%%ddp --cpus 1\na\nraise ValueError")
    kernel.ok("from nbddp._snapshot import Snapshot")
    kernel.ok("held = [b for o in gc.get_objects() if type(o) is Snapshot for b in o.buffers]")
    assert kernel.get("len(held)") == 0


def test_what_cannot_be_loaded_in_the_notebook(kernel: Kernel) -> None:
    kernel.ok("import os\npid = os.getpid()\na = bad = 'old'")
    reply = kernel.run(
        "%%ddp --cpus 1 --out a,bad\na = 1\nclass Bad:\n    def __reduce__(self): return explode, ()\n"
        "def explode(): raise OSError('only there')\nbad = Bad()"
    )
    assert reply.error == "ResultError"
    assert "'bad' came back, but cannot be loaded here: OSError: only there. Nothing was assigned" in reply.message
    assert kernel.get("a, bad") == ("old", "old")


SOME_BAD = """%%ddp --cpus 1 -o stated,early,unhashed,inside,shared,late,big,net,frame,array,weak,total,frozen,evaluate
import torch, weakref, numpy as np, pandas as pd
def explode(*args): raise OSError('only there')
class Bad:
    def __reduce__(self): return explode, (1,)
class Stated:
    def __setstate__(self, state): raise KeyError(state['x'])
class Unhashed:
    def __init__(self): self.x = 1
    def __hash__(self): return hash(self.x)
class Total:
    def __init__(self, parts): self.parts = parts
    def __getstate__(self): return self.parts
    def __setstate__(self, parts): self.sum = sum(getattr(p, 'n', 0) for p in parts)
bad = Bad()
def evaluate(): return bad
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
    def forward(self, x): return self.layer(x)
common = [1, 2]
stated = Stated()
stated.x = common
early, unhashed, inside = Bad(), {Unhashed()}, {'deep': [(Bad(), common)]}
unhashed.pop().me = unhashed
late, big, net = [common], torch.ones(1 << 18), Net()
shared = [inside['deep'], common]
frame, array = pd.DataFrame({'x': [1, Bad()]}), np.array([Bad(), 2], dtype=object)
weak, total = weakref.WeakValueDictionary(bad=bad), Total([Bad()])
frozen = Unhashed()
frozen.me = frozenset([frozen])
frozen = frozen.me
"""


def test_what_can_be_loaded_is_left_over(kernel: Kernel) -> None:
    kernel.ok("frame = array = 'old'")
    reply = kernel.run(SOME_BAD)
    assert reply.error == "ResultError"
    for name, why in (
        ("stated", "KeyError: [1, 2]"),
        *((name, "OSError: only there") for name in ("early", "inside", "frame", "array", "weak", "total")),
        ("evaluate", "it depends on what could not be loaded of another name"),
        ("shared", "it depends on what could not be loaded of another name"),
        ("frozen", "AttributeError"),
    ):
        assert f"'{name}' came back, but cannot be loaded here: {why}" in reply.message
    assert "'bad' came" not in reply.message
    assert "%ddp results has the rest: unhashed, late, big, net" in reply.message
    kernel.ok("rest = get_ipython().run_line_magic('ddp', 'results')")
    assert kernel.get("sorted(rest), rest['late'], rest['big'].sum().item()") == (
        ["big", "late", "net", "unhashed"],
        [[1, 2]],
        float(1 << 18),
    )
    assert kernel.get("list(rest['net'](rest['big'][:2]).shape)") == [2]
    assert kernel.get("frame, array") == ("old", "old")


def test_whose_result_cannot_be_loaded(kernel: Kernel) -> None:
    reply = kernel.run(
        "%%ddp --cpus 3 --gather x\nclass Bad:\n    def __reduce__(self): return int, ('z',)\n"
        "x = Bad() if rank == 1 else rank"
    )
    assert "'x' came back, but cannot be loaded here: ValueError: " in reply.message
    assert "on rank 1. Nothing" in reply.message
    assert kernel.get("get_ipython().run_line_magic('ddp', 'results')") == {"x": {0: 0, 2: 2}}


def test_nothing_is_assigned_when_the_run_fails(kernel: Kernel) -> None:
    kernel.ok("a = 'old'")
    reply = kernel.run("%%ddp --cpus 2 --out a\na = 'new'\nif rank == 1:\n    raise ValueError('late')")
    assert reply.error == "ValueError"
    assert kernel.get("a") == "old"
    assert "nothing is left over" in kernel.run("%ddp results").message


def test_explain_tells_what_the_last_cell_takes(kernel: Kernel) -> None:
    kernel.ok(
        "import torch\nw = torch.zeros(1000, 1000)\nclass Net(torch.nn.Module): pass\ndef helper(): pass\n"
        "def train(m): return Net, helper"
    )
    kernel.ok("%%ddp --cpus 1\nx = w\ntrain(w)\ntorch")
    lines = kernel.ok("%ddp explain").text.splitlines()
    assert lines[0] == "%%ddp --cpus 1"
    assert lines[1].startswith("sent to each rank, 4.0 MB in all:")
    rows = [line.split() for line in lines[2:-1]]
    assert rows[0] == ["name", "type", "size", "used", "on", "line"]
    assert ["w", "torch.Tensor", "(1000,", "1000)", "torch.float32", "4.0", "MB", "2,", "3"] in rows
    assert ["torch", "module", "torch", "by", "name", "4"] in rows
    assert lines[-1] == "by value, since the notebook defines them: train, Net, helper"
    assert "torch.Tensor" in kernel.ok("%ddp explain w").text
    assert "the notebook has no variable nothing" in kernel.run("%ddp explain nothing").text


def test_explain_tells_what_functions_bring(kernel: Kernel) -> None:
    kernel.ok(
        "import torch\ndata = torch.zeros(1000, 100)\nscale = 2\nunused = 3\n"
        "class Net:\n    def forward(self): return data * scale\n"
        "def helper(): return data.unused\ndef fit(): return Net().forward(), helper()"
    )
    rows = [line.split() for line in kernel.ok("%%ddp --cpus 1 --dry-run\nfit, scale").text.splitlines()]
    (data,) = [row for row in rows if row[0] == "data"]
    assert data[1:5] == ["torch.Tensor", "(1000,", "100)", "torch.float32"]
    assert data[-2:] == ["by", "Net.forward"]
    # What the cell uses itself has a row of its own already; of what is only called like a variable there is none.
    assert [row[-1] for row in rows if row[0] == "scale"] == ["2"]
    assert not any(row[0] == "unused" for row in rows)


def test_large_captures_are_pointed_out(kernel: Kernel) -> None:
    kernel.ok("import torch\nw, small = torch.zeros(1000, 1000), 1\n%config DDPMagics.large = 1e6")
    reply = kernel.ok("%%ddp --cpus 1\nw, small\npass")
    kernel.ok("%config DDPMagics.large = 1e9")
    assert reply.text == (
        "nbddp: 4.0 MB go to the ranks; the largest is w (torch.Tensor (1000, 1000) torch.float32, 4.0 MB)\n"
    )
    assert kernel.ok("%%ddp --cpus 1\nw, small\npass").text == ""
