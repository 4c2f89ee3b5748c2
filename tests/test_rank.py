"""A forked rank is what a new process would be."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbddp import _process
from tests.kernel import Kernel


def test_thread_limits_follow_the_ranks(kernel: Kernel) -> None:
    kernel.ok("import torch, numpy")
    probe = (
        "import threadpoolctl, os\n"
        "blas = {p['internal_api']: p['num_threads'] for p in threadpoolctl.threadpool_info()}\n"
        "print(torch.get_num_threads(), blas['openblas'], os.environ['OMP_NUM_THREADS'])"
    )
    cores = len(os.sched_getaffinity(0))
    assert kernel.ok(f"%%ddp --cpus 1\n{probe}").text == f"{cores} {cores} {cores}\n"
    each = max(1, cores // 2)
    assert kernel.ok(f"%%ddp --cpus 2\n{probe}").lines == [f"[rank {r}] {each} {each} {each}" for r in (0, 1)]
    assert kernel.ok(f"%%ddp --cpus 2 --env OMP_NUM_THREADS=3\n{probe}").lines == ["[rank 0] 3 3 3", "[rank 1] 3 3 3"]


def test_more_threads_than_the_launcher_had_really_work(kernel: Kernel) -> None:
    kernel.ok("import torch")
    reply = kernel.ok(
        "%%ddp --cpus 1 --env OMP_NUM_THREADS=4\na = torch.ones(2000, 2000)\n"
        "print((a @ a).sum().item() == 2000.0 ** 3)\n"
        "print(torch.ones(10**7).sum().item(), len(os.listdir('/proc/self/task')) >= 4)\n".replace(
            "print(torch", "import os\nprint(torch"
        )
    )
    assert reply.text.splitlines() == ["True", "10000000.0 True"]


def test_random_state_differs_from_rank_to_rank_and_run_to_run(kernel: Kernel) -> None:
    kernel.ok("import torch, numpy as np, random")
    seen = []
    for _ in range(2):
        reply = kernel.ok("%%ddp --cpus 2\nprint(torch.rand(1).item(), np.random.rand(), random.random())")
        seen += [line.partition("] ")[2].split() for line in reply.lines]
    for column in zip(*seen, strict=True):
        assert len(set(column)) == 4


def test_seeds_give_what_they_give_under_torchrun(kernel: Kernel) -> None:
    kernel.ok("import torch, numpy as np")
    reply = kernel.ok(
        "%%ddp --cpus 1\ntorch.manual_seed(0)\nnp.random.seed(0)\nprint(torch.rand(1).item(), np.random.rand())"
    )
    code = (
        "import torch, numpy as np; torch.manual_seed(0); np.random.seed(0); "
        "print(torch.rand(1).item(), np.random.rand())"
    )
    bare = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert reply.text == f"{bare.stdout}"


def test_environment_directory_umask_and_path_are_the_notebooks(kernel: Kernel, tmp_path: Path) -> None:
    folder = tmp_path / "with space % ' \" ü"
    folder.mkdir()
    (folder / "mine.py").write_text("VALUE = 1\n")
    kernel.ok(
        f"import os, sys\nos.chdir({str(folder)!r})\nos.environ['MINE'] = 'ü \"x'\nold = os.umask(0o027)\nimport mine"
    )
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport os\nprint(os.getcwd(), os.environ['MINE'], mine.VALUE)\nopen('made', 'w').close()\n"
        "print(oct(os.stat('made').st_mode & 0o777), 'NBDDP_RUN_DIR' in os.environ, "
        "'PYTORCH_NVML_BASED_CUDA_CHECK' in os.environ)"
    )
    kernel.ok("os.umask(old); del os.environ['MINE']")
    assert reply.text.splitlines() == [f'{folder} ü "x 1', "0o640 False False"]


def test_an_edited_module_is_seen_fresh(kernel: Kernel, tmp_path: Path) -> None:
    module = tmp_path / "edited.py"
    module.write_text("VALUE = 'first'\n")
    kernel.ok(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport edited")
    assert kernel.ok("%%ddp --cpus 1\nprint(edited.VALUE)").text == "first\n"
    module.write_text("VALUE = 'a longer second'\n")
    assert kernel.ok("%%ddp --cpus 1\nprint(edited.VALUE)").text == "a longer second\n"


def test_files_named_like_the_standard_library_do_no_harm(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernel = new_kernel(cwd=str(tmp_path), load=False)
    # The kernel has imported these by now; the launcher is still to.
    for name in ("queue", "random", "tokenize", "code", "types", "numbers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('shadow')\n")
    kernel.ok("%load_ext nbddp")
    assert kernel.ok("%%ddp --cpus 1\nprint('fine')").text == "fine\n"


def test_a_variable_that_torch_reads_when_it_loads_takes_effect(kernel: Kernel) -> None:
    kernel.ok("import os, nbddp._function as f\nbefore = f.client._process.pid\nimport torch")
    reply = kernel.ok(
        "%%ddp --cpus 1 --env TORCH_SHOW_CPP_STACKTRACES=1 --env PYTHONHASHSEED=7\nimport os\n"
        "print(hash('x'), os.environ['PYTHONHASHSEED'])"
    )
    bare = subprocess.run(
        [sys.executable, "-c", "print(hash('x'), 7)"],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert reply.text == (
        "nbddp: PYTHONHASHSEED, TORCH_SHOW_CPP_STACKTRACES changed, which torch reads when it loads; loading it anew\n"
        f"{bare.stdout}"
    )
    kernel.ok("%%ddp --cpus 1 --env HARMLESS=1\npass")
    assert kernel.get("f.client._process.pid != before") is True


def test_variables_that_are_read_later_need_no_new_launcher(kernel: Kernel) -> None:
    kernel.ok("%%ddp --cpus 1\npass")
    kernel.ok("import nbddp._function as f\nbefore = f.client._process.pid")
    kernel.ok(
        "%%ddp --cpus 1 --env NCCL_DEBUG=INFO --env OMP_NUM_THREADS=2 --env TORCH_DISTRIBUTED_DEBUG=DETAIL "
        "--env PYTORCH_NVML_BASED_CUDA_CHECK=1\n"
        "import torch.distributed as d\nprint(d.get_debug_level())"
    )
    assert kernel.get("f.client._process.pid == before") is True


def test_debug_level_is_that_of_the_run(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1 --env TORCH_DISTRIBUTED_DEBUG=DETAIL\nimport torch.distributed as d\nprint(d.get_debug_level())"
    )
    assert "DebugLevel.DETAIL" in reply.text


def test_signal_handlers_are_pythons_own(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler, "
        "signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "
        "signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set())"
    )
    assert reply.text == "True True True True\n"


def test_nothing_of_the_launcher_is_open_in_a_rank(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2 --no-init\nimport os, contextlib\nlinks = []\nfor n in os.listdir('/proc/self/fd'):\n"
        "    with contextlib.suppress(FileNotFoundError):\n        links.append(os.readlink(f'/proc/self/fd/{n}'))\n"
        "print(sum(l.startswith('socket') for l in links), sum('event' in l for l in links), "
        "os.readlink('/proc/self/fd/0'))"
    )
    # One socket, to the notebook; and what waits for it.
    assert reply.lines == [f"[rank {rank}] 1 1 /dev/null" for rank in (0, 1)]


def test_main_is_the_script_and_the_interpreter_is_not_interactive(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport sys, __main__\nx = 5\n"
        "print(__main__.x, __name__, vars(__main__) is globals(), hasattr(sys, 'ps1'), "
        "len(sys.argv), get_ipython() is not None)"
    )
    assert reply.text == "5 __main__ True False 1 True\n"


def test_temporary_files_go_where_they_go_in_the_notebook(kernel: Kernel) -> None:
    kernel.ok("import tempfile\nexpected = tempfile.gettempdir()")
    assert kernel.ok("%%ddp --cpus 1\nprint(tempfile.gettempdir() == expected)").text == "True\n"


SELF_INITIALISED = """
import os, torch, torch.distributed as dist
from torch.distributed import init_process_group, destroy_process_group
def setup(backend):
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init_process_group(backend, init_method="env://", rank=rank, world_size=world_size)
"""


@pytest.mark.parametrize(
    "call", ["setup('gloo')", "init_process_group('gloo')", "dist.init_process_group(backend='gloo')"]
)
def test_code_that_initialises_the_group_itself_runs_unchanged(kernel: Kernel, call: str) -> None:
    kernel.ok(SELF_INITIALISED)
    reply = kernel.ok(
        f"%%ddp --cpus 2\n{call}\ndist.barrier()\nt = torch.ones(1)\ndist.all_reduce(t)\n"
        f"print(t.item())\ndestroy_process_group()"
    )
    assert reply.lines == ["[rank 0] 2.0", "[rank 1] 2.0"]


def test_annotations_of_a_cells_functions(kernel: Kernel) -> None:
    kernel.ok("from collections.abc import Sequence\nfrom fractions import Fraction")
    reply = kernel.ok(
        "%%ddp --cpus 1\ndef total(x: Sequence[int]) -> Fraction:\n    return sum(x)\nprint(total([1, 2]))"
    )
    assert reply.text == "3\n"


def test_processes_that_a_rank_spawns_meet_where_they_say(kernel: Kernel) -> None:
    kernel.ok(
        "import socket, torch, torch.distributed as dist, torch.multiprocessing as mp\n"
        "def worker(index, port):\n"
        "    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=index, world_size=2)\n"
        "    t = torch.ones(1)\n    dist.all_reduce(t)\n"
        "    if index == 0: print(t.item())\n"
        "    dist.destroy_process_group()"
    )
    reply = kernel.ok(
        "%%ddp --cpus 1\nwith socket.create_server(('127.0.0.1', 0)) as server:\n    port = server.getsockname()[1]\n"
        "mp.spawn(worker, (port,), nprocs=2)",
        timeout=60,
    )
    assert reply.lines == ["2.0"]


def test_data_loader_workers(kernel: Kernel) -> None:
    kernel.ok(
        "import torch\nclass Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 6\n    def __getitem__(self, i): return torch.tensor(i)"
    )
    for context in ("fork", "spawn", "forkserver"):
        reply = kernel.ok(
            f"%%ddp --cpus 2\n"
            f"loader = torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context='{context}')\n"
            "print(sum(b.item() for b in loader))"
        )
        assert reply.lines == ["[rank 0] 15", "[rank 1] 15"], context


def test_classes_are_found_where_pickle_looks(kernel: Kernel, tmp_path: Path) -> None:
    kernel.ok("import torch, pickle\nclass Net(torch.nn.Linear): pass\nnet = Net(2, 2)")
    path = tmp_path / "net.pt"
    kernel.ok(f"%%ddp --cpus 1\ntorch.save(net, {str(path)!r})\nprint(pickle.loads(pickle.dumps(Net)) is Net)")
    assert kernel.get(f"type(torch.load({str(path)!r}, weights_only=False)) is Net") is True


def test_a_model_that_comes_back_is_of_the_notebooks_class(kernel: Kernel) -> None:
    kernel.ok("import torch\nclass Net(torch.nn.Linear):\n    pass\nmodel = Net(2, 2)")
    reply = kernel.ok(
        "%%ddp --cpus 2 --out model,opt\nmodel = torch.nn.parallel.DistributedDataParallel(model)\n"
        "opt = torch.optim.SGD(model.parameters(), lr=1.)\nmodel(torch.ones(1, 2)).sum().backward()\nopt.step()"
    )
    assert reply.text == "nbddp: DistributedDataParallel was unwrapped: its .module came back\n"
    assert kernel.get("type(model) is Net, opt.param_groups[0]['params'][0] is model.weight") == (True, True)


def test_sources_of_notebook_code_are_known_in_the_rank(kernel: Kernel) -> None:
    kernel.ok("import inspect, torch, warnings\ndef double(x):\n    # commented\n    return x * 2")
    reply = kernel.ok(
        "%%ddp --cpus 1\nwarnings.simplefilter('ignore')\nprint('commented' in inspect.getsource(double))\n"
        "print(torch.jit.script(double)(torch.ones(1)).item())"
    )
    assert reply.text.splitlines() == ["True", "2.0"]


def test_the_cells_own_source_is_known(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 1\nimport inspect\ndef f():\n    return 1\nprint(inspect.getsource(f))")
    assert reply.text == "def f():\n    return 1\n\n"


def test_tensors_are_shared_copy_on_write(kernel: Kernel) -> None:
    kernel.ok("import torch\nbig = torch.zeros(1 << 20)\nview = big[10:20]")
    reply = kernel.ok(
        "%%ddp --cpus 2\nbig[10] = rank + 1\n"
        "print(view[0].item(), big.sum().item(), big.untyped_storage().data_ptr() == view.untyped_storage().data_ptr())"
    )
    assert reply.lines == ["[rank 0] 1.0 1.0 True", "[rank 1] 2.0 2.0 True"]
    assert kernel.get("big.sum().item()") == 0.0


def test_the_agent_has_no_second_thread_while_it_forks(kernel: Kernel) -> None:
    # A lock that such a thread holds at that moment would stay locked in the rank.
    kernel.ok("%%ddp --cpus 3 --gather threads\nimport os\nthreads = len(os.listdir(f'/proc/{os.getppid()}/task'))")
    assert kernel.get("threads") == [1] * 3


def test_hanging_up_closes_connections_and_nothing_else() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    peer, _ = server.accept()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            before = sorted(os.listdir("/dev/fd"))
            _process.hang_up()
            os.write(write, b"pipes stay")
            code = 0 if sorted(os.listdir("/dev/fd")) == before else 2
        os._exit(code)
    client.close()  # the child held it, too
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.read(read, 100) == b"pipes stay"
    peer.settimeout(5)
    assert peer.recv(1) == b""
    for fd in (read, write):
        os.close(fd)
    for sock in (peer, server):
        sock.close()


# The second of two ranks is stopped for a moment as soon as it has said where it listens.
LATE = """%%ddp --cpus 2 --no-init
import os, signal, subprocess
import torch.distributed as dist

class Late(dist.Store):
    def __init__(self, store):
        super().__init__()
        self.store = store
    def get(self, key):
        return self.store.get(key)
    def wait(self, *keys_and_timeout):
        return self.store.wait(*keys_and_timeout)
    def add(self, key, count):
        return self.store.add(key, count)
    def check(self, keys):
        return self.store.check(keys)
    def set(self, key, value):
        self.store.set(key, value)
        if rank and not dist.is_initialized():
            subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)

store = Late(dist.FileStore(PLACE, 2))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
print("there")
"""


def test_a_rank_that_is_done_at_once_leaves_no_other_behind_that_still_connects(kernel: Kernel, tmp_path: Path) -> None:
    # Which of the two connects to the other depends on their ports: it is the same in all turns once in 32 times.
    for turn in range(6):
        reply = kernel.ok(LATE.replace("PLACE", repr(str(tmp_path / f"{turn}"))))
        assert sorted(reply.lines) == ["[rank 0] there", "[rank 1] there"]
