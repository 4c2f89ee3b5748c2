"""The %%ddp line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbddp._option_line import HelpAsked, help_text, option_names, parse
from nbddp._options import OptionError, Options
from tests.kernel import Kernel


def test_everything_at_once() -> None:
    options = parse(
        "--gpus 2 --backend gloo --out a,b -o c,a --env 'A=b c' --env B= --timeout 1.5 --no-init --max-restarts 3 "
        "--dry-run"
    )
    assert options == Options(
        gpus=2,
        backend="gloo",
        out=("a", "b", "c"),
        env={"A": "b c", "B": ""},
        timeout=1.5,
        init=False,
        max_restarts=3,
        dry_run=True,
    )
    assert parse("--gpu-ids 4,5,6,7").gpu_ids == (4, 5, 6, 7)
    assert parse("").gpus is None
    assert parse("-g 3").gpus == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--gpus 0", "--gpus 0: a run has at least one rank"),
        ("--gpus -1", "--gpus -1: a run has at least one rank"),
        ("--gpus two", "'two' is no whole number"),
        ("--cpus 0", "--cpus 0: a run has at least one rank"),
        ("--gpus", "expected one argument"),
        ("--gpu 2", "unrecognized arguments: --gpu 2"),
        ("--wrong", "unrecognized arguments: --wrong"),
        ("2", "unrecognized arguments: 2"),
        ("--gpus 2 --cpus 2", "give one of them"),
        ("--gpu-ids 1,1", "each GPU can be given once"),
        ("--gpu-ids=-1", "by its number from 0"),
        ("--gpus 3 --gpu-ids 0,1", "differ in number"),
        ("--out a-b", "--out a-b: that is no name"),
        ("--out a.b", "that is no name"),
        ("--env FOO", "'FOO' is not of the form KEY=VALUE"),
        ("--env =1", "not of the form KEY=VALUE"),
        ("--timeout 0", "--timeout 0: a number of seconds above 0"),
        ("--timeout -3", "a number of seconds above 0"),
        ("--timeout inf", "a number of seconds above 0"),
        ("--timeout nan", "a number of seconds above 0"),
        ("--timeout soon", "'soon' is no number of seconds"),
        ("--max-restarts -1", "--max-restarts -1: 0 or more"),
        ("--keep-script /no/such/folder/run.py", "there is no folder /no/such/folder"),
        ("--keep-script /", "that is a folder"),
        ("--env 'A=b", "No closing quotation"),
    ],
)
def test_faults_are_named(line: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["-h", "--help", "--gpus 2 -h"])
def test_help(line: str) -> None:
    with pytest.raises(HelpAsked) as asked:
        parse(line)
    assert str(asked.value) == help_text()


def test_help_explains_every_option_with_examples() -> None:
    text = help_text()
    assert "%%ddp --gpus 4" in text
    for name in option_names():
        assert name in text
    assert len(option_names()) == 28


@pytest.mark.parametrize("line", ["--gpus 0", "--gpus -1", "--gpus two", "--frobnicate", "--out 1x"])
def test_a_fault_is_one_line_in_the_notebook(kernel: Kernel, line: str) -> None:
    reply = kernel.run(f"%%ddp {line}\nprint(1)")
    assert reply.status == "error"
    assert reply.stderr.startswith("UsageError: ")
    assert reply.stderr.count("\n") == 1
    assert reply.text == reply.stderr


@pytest.mark.parametrize("cell", ["%%ddp -h", "%%ddp --help\nprint(1)", "%ddp --help"])
def test_help_in_the_notebook(kernel: Kernel, cell: str) -> None:
    text = kernel.ok(cell).text
    assert "%%ddp" in text
    if cell.startswith("%%"):
        assert "--max-restarts N" in text
        assert "examples:" in text


def test_help_by_question_mark(kernel: Kernel) -> None:
    reply = kernel.client.execute("%%ddp?", reply=True, timeout=30)
    page = reply["content"]["payload"][0]["data"]["text/plain"]
    assert "--max-restarts N" in page
    assert "%%ddp --gpus 2 --out model,losses" in page


def test_an_expression_in_the_line_is_expanded(kernel: Kernel) -> None:
    kernel.ok("n = 2")
    assert len(kernel.ok("%%ddp --cpus {n}\nprint('{n}')").lines) == 2


@pytest.mark.parametrize(
    ("out", "hint"),
    [("lossess", "the cell never binds 'lossess'; did you mean losses?"), ("zz", "the cell never binds 'zz'")],
)
def test_a_name_that_the_cell_cannot_bind_is_refused_before_launch(kernel: Kernel, out: str, hint: str) -> None:
    reply = kernel.run(f"%%ddp --cpus 2 --out {out}\nlosses = []\nprint('ran')")
    assert hint in reply.stderr
    assert "ran" not in reply.text


@pytest.mark.parametrize(
    "binding", ["exec('x = 5')", "globals()['x'] = 5", "from shop import *", "for x in [5]: pass", "import math as x"]
)
def test_a_name_that_the_cell_may_bind_is_not_refused(kernel: Kernel, binding: str, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("x = 5\n")
    kernel.ok(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})")
    kernel.ok(f"%%ddp --cpus 1 --out x\n{binding}")
    assert kernel.get("'x' in globals()") is True


def test_a_name_that_was_not_bound_after_all(kernel: Kernel) -> None:
    kernel.ok("a = 'old'")
    reply = kernel.run("%%ddp --cpus 2 --out a,x\na = 'new'\nif world_size == 7:\n    x = 5")
    assert reply.error == "ResultError"
    assert reply.message == ("--out a,x: the cell did not bind 'x'. Nothing was assigned; %ddp results has the rest: a")
    assert kernel.get("a") == "old"
    assert kernel.get("get_ipython().run_line_magic('ddp', 'results')") == {"a": "new"}
    kernel.ok("%%ddp --cpus 1 --out a\na = 'newer'")
    assert "nothing is left over" in kernel.run("%ddp results").message


def test_a_result_that_cannot_come_back_is_named(kernel: Kernel) -> None:
    kernel.ok("a = 'old'")
    reply = kernel.run("%%ddp --cpus 2 --out a,b\nimport threading\na = 'new'\nb = {'deep': [threading.Lock()]}")
    assert reply.error == "ResultError"
    assert reply.message == (
        "--out a,b: cannot bring back 'b['deep'][0]' (_thread.lock): cannot pickle '_thread.lock' object. "
        "Nothing was assigned; %ddp results has the rest: a"
    )
    assert kernel.get("a") == "old"


def test_environment_variables(kernel: Kernel) -> None:
    kernel.ok("import os\nos.environ['FROM_NOTEBOOK'] = 'n'")
    reply = kernel.ok(
        "%%ddp --cpus 1 --env 'A=b c' --env FROM_NOTEBOOK=x\nimport os\n"
        "print(os.environ['A'], os.environ['FROM_NOTEBOOK'])"
    )
    assert reply.text == "b c x\n"
    assert kernel.get("os.environ.pop('FROM_NOTEBOOK'), 'A' in os.environ") == ("n", False)


def test_no_init_leaves_the_process_group_to_the_cell(kernel: Kernel) -> None:
    kernel.ok("import torch.distributed as dist")
    reply = kernel.ok(
        "%%ddp --cpus 2 --no-init\nprint(dist.is_initialized())\n"
        "dist.init_process_group('gloo')\nprint(dist.get_world_size())"
    )
    assert reply.lines == ["[rank 0] 2", "[rank 0] False", "[rank 1] 2", "[rank 1] False"]


def test_backend(kernel: Kernel) -> None:
    kernel.ok("import torch.distributed as dist")
    assert kernel.ok("%%ddp --cpus 1\nprint(dist.get_backend())").text == "gloo\n"
    reply = kernel.run("%%ddp --cpus 1 --backend nonsense\nprint(1)")
    assert reply.error == "LaunchError"
    assert reply.message == (
        "--backend nonsense: torch has gloo here, and no 'nonsense'. Without --backend it is nccl on GPUs and gloo on "
        "the CPU"
    )
    assert "no 'glo'. Did you mean gloo?" in kernel.run("%%ddp --cpus 1 --backend cpu:glo\nprint(1)").message
    reply = kernel.run("%%ddp --cpus 1 --backend nonsense --dry-run\nprint(1)")
    assert reply.error == "LaunchError"
    # Who makes the group himself may have what nbddp does not know of.
    assert kernel.ok("%%ddp --cpus 1 --backend nonsense --no-init\nprint(1)").text == "1\n"


def test_a_line_is_read_as_people_mean_it() -> None:
    assert parse("--out model, losses --cpus 2  # two ranks").out == ("model", "losses")
    assert parse("--out model ,losses").out == ("model", "losses")
    assert parse("--env A=b#c").env == {"A": "b#c"}


@pytest.mark.parametrize(
    ("line", "hint"),
    [("--cpu 2", "--cpus"), ("--uot a", "--out"), ("--nproc_per_node=2", "--gpus"), ("--num-gpus 2", "--gpus")],
)
def test_a_wrong_option_is_told_the_right_one(line: str, hint: str) -> None:
    with pytest.raises(OptionError, match=rf"did you mean {hint}\?"):
        parse(line)


def test_what_torchrun_sets_cannot_be_set() -> None:
    with pytest.raises(OptionError, match="--env RANK=5: torchrun sets RANK itself"):
        parse("--env RANK=5")


def test_dry_run_shows_and_launches_nothing(kernel: Kernel) -> None:
    kernel.ok("import torch\nw = torch.zeros(1000, 1000)\nconfig = {'lr': 0.1}\ndef train(m): return m\nunused = 1")
    reply = kernel.ok("%%ddp --cpus 2 --dry-run\nprint('cell' + 'runs')\ntrain(w, config)\ntorch.ones(1)")
    assert "cellruns" not in reply.text
    lines = reply.text.splitlines()
    assert lines[0].startswith("torchrun --nnodes 1 --nproc-per-node 2 --rdzv-backend nbddp")
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert set(rows) == {"name", "w", "config", "train", "torch"}
    assert rows["w"].endswith(" 4.0 MB  3")
    assert lines[-1] == "by value, since the notebook defines them: train"
    assert "torch.Tensor (1000, 1000) torch.float32" in rows["w"]
    assert "4.0 MB" in rows["w"]
    assert "dict" in rows["config"]
    assert "function" in rows["train"]
    assert "module torch" in rows["torch"]

    kernel.ok("import threading\nv = w[:10]\nlock = threading.Lock()")
    reply = kernel.ok("%%ddp --cpus 2 --dry-run\nprint(w, v)")
    assert "sent to each rank, 4.0 MB in all" in reply.text  # they share their memory
    reply = kernel.run("%%ddp --cpus 2 --dry-run\npass\nprint(lock)")
    assert "cannot send 'lock' (_thread.lock), used on line 3 of the cell" in reply.message


def test_the_options_are_completed(kernel: Kernel) -> None:
    def complete(line: str) -> list[str]:
        reply = kernel.client.complete(line, len(line), reply=True, timeout=30)
        return list(reply["content"]["matches"])

    # Among what IPython itself takes a word after two hyphens for.
    assert {"--gpus", "--gpu-ids"} <= set(complete("%%ddp --g"))
    assert "--out" in complete("%%ddp --gpus 2 --ou")
