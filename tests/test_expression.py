"""%ddp EXPRESSION."""

from __future__ import annotations

import pytest

from nbddp._expression import split
from nbddp._options import OptionError
from tests.kernel import Kernel


@pytest.mark.parametrize(
    ("line", "options", "expression"),
    [
        ("rank", "", "rank"),
        ("--cpus 2 rank", "--cpus 2", "rank"),
        ("--cpus=2   [rank, 1]", "--cpus=2", "[rank, 1]"),
        ("-g 2 --plain rank", "-g 2 --plain", "rank"),
        ("--env 'A=b c' --env B=1 os.environ['A']", "--env 'A=b c' --env B=1", "os.environ['A']"),
        ("--gpu-ids 0, 1 rank", "--gpu-ids 0, 1", "rank"),
        ("-1 + rank", "", "-1 + rank"),
        ("--cpus 2 -rank", "--cpus 2", "-rank"),
        ("--cpus 2 --wrong x", "--cpus 2 --wrong", "x"),
        ("""'it"s' + "it's" """, "", """'it"s' + "it's\""""),
        ("--cpus 2", "--cpus 2", ""),
        ("--cpus", "--cpus", ""),
    ],
)
def test_options_stand_before_the_expression(line: str, options: str, expression: str) -> None:
    assert split(line) == (options, expression)


def test_a_quotation_without_an_end() -> None:
    with pytest.raises(OptionError, match="No closing quotation"):
        split("--env 'A=b rank")


def test_its_value_is_that_of_rank_0(kernel: Kernel) -> None:
    kernel.ok("import torch, torch.distributed as dist\nclass Own:\n    pass\nown, loss, n, log = Own(), 3.0, 2, 5")
    kernel.ok("x = %ddp --cpus 2 [dist.get_rank(), world_size]")
    assert kernel.get("x") == [0, 2]
    # The object itself, and not what it looks like; what is the notebook's own class comes back as that.
    kernel.ok("y = %ddp --cpus 1 (torch.ones(2) * loss, own)")
    assert kernel.get("y[0].tolist(), type(y[1]) is Own") == ([3.0, 3.0], True)
    # Braces are Python's; in the options they are IPython's, as on any magic's line.
    assert kernel.ok("%ddp --cpus {n} {rank: f'{loss}', 'n': world_size}  # a comment").value == {
        "text/plain": "{0: '3.0', 'n': 2}"
    }
    assert kernel.ok("%ddp --cpus 1 await __import__('asyncio').sleep(0, 'slept')").value == {"text/plain": "'slept'"}
    kernel.ok("def inside(a):\n    b = %ddp --cpus 1 a + 1\n    return b")
    assert kernel.get("inside(4)") == 5
    # What is assigned in a rank stays there, and a cell's last result in the notebook.
    assert kernel.ok("%ddp --cpus 1 [(z := 1), 'print']\n'z' in globals()").value == {"text/plain": "False"}


def test_what_ranks_print_is_shown(kernel: Kernel) -> None:
    assert kernel.ok("%ddp --cpus 2 print('hi')").lines == ["[rank 0] hi", "[rank 1] hi"]


def test_nbddps_own_commands_come_first(kernel: Kernel) -> None:
    kernel.ok("log, status = 5, 6")
    kernel.ok("%%ddp --cpus 1\nprint('printed')")
    assert "rank0.log" in kernel.ok("%ddp log").text
    assert kernel.ok("%ddp --cpus 1 log").value == {"text/plain": "5"}
    assert kernel.ok("%config DDPMagics.defaults = '--cpus 1'\n%ddp (log + 1)").value == {"text/plain": "6"}
    kernel.ok("%config DDPMagics.defaults = ''")
    reply = kernel.run("%ddp status + 1")
    assert reply.stderr == (
        "UsageError: %ddp status + 1: nothing follows %ddp status (%ddp -h). If that is an expression for the ranks, "
        "and status a variable: %ddp (status + 1)\n"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("statsu", "%ddp statsu: the notebook has no variable 'statsu'. Did you mean %ddp status?"),
        ("statsu --now please", "Did you mean %ddp status?"),
        ("lgo --rank 1", "%ddp lgo --rank 1: that is no expression"),
        ("--cpus 2 losses", "%ddp losses: the notebook has no variable 'losses'. Did you mean loss?"),
        ("--cpus 2 qqqq(1)", "the notebook has no variable 'qqqq'. %ddp -h lists commands"),
        ("import os", "that is no expression (invalid syntax). A cell that begins with %%ddp runs statements"),
        ("1); print(2", "that is no expression"),
        ("--cpus 2", "there is nothing to evaluate: %ddp [options] EXPRESSION"),
        ("--cpu 2 rank", "did you mean --cpus?"),
        ("--cpus 2 --out x rank", "--out and --gather are for cells"),
    ],
)
def test_what_is_none_is_refused(kernel: Kernel, line: str, message: str) -> None:
    kernel.ok("loss = 1")
    reply = kernel.run(f"%ddp {line}")
    assert message in reply.stderr
    assert reply.stderr.startswith("UsageError: ")
    assert reply.stderr.count("\n") == 1
    assert reply.text == reply.stderr


def test_an_error_is_that_of_the_rank(kernel: Kernel) -> None:
    reply = kernel.run("%ddp --cpus 2 1 / rank if rank == 0 else 1")
    assert reply.failure == "rank 0 of 2 raised ZeroDivisionError: division by zero"
    assert "----> 1 _ = (1 / rank if rank == 0 else 1)" in reply.traceback
    reply = kernel.run("%ddp --cpus 1 (i for i in [1])")
    assert reply.message.startswith("%ddp: cannot bring back '_' (generator)")


def test_an_option_error_of_a_rank_is_the_ranks(kernel: Kernel) -> None:
    kernel.ok("import nbddp")
    reply = kernel.run("%ddp --cpus 1 nbddp.RunOptions(gpus=0)")
    assert reply.failure == "rank 0 raised OptionError: --gpus 0: a run has at least one rank"


def test_a_dry_run_evaluates_nothing(kernel: Kernel) -> None:
    kernel.ok("loss = 1")
    reply = kernel.ok("%ddp --cpus 2 --dry-run print('ran', loss)")
    assert reply.text.startswith("torchrun --nnodes 1 --nproc-per-node 2 ")
    assert "loss" in reply.text
    assert reply.value is None


@pytest.mark.parametrize("code", ["run_line_magic('ddp', 'status')", "run_cell_magic('ddp', '--cpus 1', 'pass')"])
def test_in_a_rank_it_is_refused(kernel: Kernel, code: str) -> None:
    reply = kernel.run(f"%%ddp --cpus 1\nget_ipython().{code}")
    assert reply.error == "LaunchError"
    assert "ddp" in reply.message.partition(":")[0]
    assert "this process is rank 0 of a run, or was started by it, and ranks cannot launch ranks" in reply.message
    reply = kernel.run("%%ddp --cpus 1\n%load_ext nbddp")
    assert reply.message.startswith("%load_ext nbddp: this process is rank 0 of a run")
