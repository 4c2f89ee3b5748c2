"""Which devices a run gets."""

from __future__ import annotations

import os

import pytest

from nbddp._devices import Devices, choose, environment, gpus_of
from nbddp._errors import LaunchError
from nbddp._options import Options
from tests.kernel import Kernel


@pytest.mark.parametrize(
    ("options", "env", "there", "expected"),
    [
        (Options(), {}, 8, Devices(8, gpus=True)),
        (Options(gpus=2), {}, 8, Devices(2, gpus=True)),
        (Options(gpu_ids=(4, 5)), {}, 8, Devices(2, gpus=True, visible="4,5")),
        (Options(gpu_ids=(0, 2)), {"CUDA_VISIBLE_DEVICES": "4,5,6"}, 3, Devices(2, gpus=True, visible="4,6")),
        (Options(gpu_ids=(1,)), {"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}, 2, Devices(1, gpus=True, visible="GPU-bb")),
        (Options(gpu_ids=(0,)), {"CUDA_VISIBLE_DEVICES": "2,3,"}, 2, Devices(1, gpus=True, visible="2")),
        (Options(cpus=3), {}, 8, Devices(3, gpus=False)),
    ],
)
def test_choices(options: Options, env: dict[str, str], there: int, expected: Devices) -> None:
    assert choose(options, env, lambda: there) == expected


def test_without_gpus_the_same_cell_runs_on_the_cpu_and_says_so() -> None:
    devices = choose(Options(gpus=2), {}, lambda: 0)
    assert (devices.ranks, devices.gpus) == (2, False)
    assert devices.note == "nbddp: there is no GPU here; 2 ranks on the CPU, over gloo"


@pytest.mark.parametrize(
    ("options", "there", "message"),
    [
        (Options(gpus=4), 2, "--gpus 4: there are 2 GPUs here. Ask for --gpus 2, or for --cpus 4 to run on the CPU"),
        (Options(gpus=2), 1, "--gpus 2: there is 1 GPU here."),
        (Options(gpu_ids=(0, 4)), 2, "--gpu-ids 0,4: there are 2 GPUs here, numbered from 0"),
        (Options(gpu_ids=(0, 1)), 0, "--gpu-ids 0,1: there is no GPU here. --cpus 2 runs on the CPU"),
        (Options(), 0, "there is no GPU here. Say how many ranks run on the CPU: --cpus 2, or cpus=2 in launch"),
    ],
)
def test_what_is_not_there_is_said(options: Options, there: int, message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        choose(options, {}, lambda: there)
    assert str(caught.value).startswith(message)


def test_gpus_that_cannot_be_told_are_refused() -> None:
    with pytest.raises(LaunchError, match="CUDA_VISIBLE_DEVICES=,2 does not say which GPUs these are"):
        choose(Options(gpu_ids=(0,)), {"CUDA_VISIBLE_DEVICES": ",2"}, lambda: 1)


def test_gpu_ids_count_among_those_that_env_leaves() -> None:
    options = Options(gpu_ids=(4, 5), env={"CUDA_VISIBLE_DEVICES": "2,3,4,5,6,7"})
    devices = choose(options, options.env, lambda: 6)
    assert environment({}, options, devices)["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_cpu_ranks_do_not_look_for_gpus() -> None:
    def look() -> int:
        raise AssertionError

    assert choose(Options(cpus=2), {}, look).ranks == 2


def test_the_environment_is_completed_not_overruled() -> None:
    cores = len(os.sched_getaffinity(0))
    env = environment({}, Options(), Devices(2, gpus=False))
    assert env["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "lo"
    given = {"OMP_NUM_THREADS": "5", "GLOO_SOCKET_IFNAME": "eth7"}
    env = environment(given, Options(env={"NCCL_SOCKET_IFNAME": "ib0"}), Devices(2, gpus=True, visible="1,3"))
    assert env == {**given, "NCCL_SOCKET_IFNAME": "ib0", "CUDA_VISIBLE_DEVICES": "1,3"}
    assert environment({}, Options(), Devices(1000, gpus=False))["OMP_NUM_THREADS"] == "1"


def test_in_the_notebook(kernel: Kernel) -> None:
    kernel.ok("import torch")
    if kernel.get("torch.cuda.is_available()"):
        pytest.skip("there is a GPU here, and this test is about machines without")
    reply = kernel.ok("%%ddp --gpus 2\nprint(device)")
    assert reply.text.splitlines()[0] == "nbddp: there is no GPU here; 2 ranks on the CPU, over gloo"
    assert reply.lines[:2] == ["[rank 0] cpu", "[rank 1] cpu"]
    reply = kernel.run("%%ddp\nprint(1)")
    assert reply.error == "LaunchError"
    assert (
        reply.traceback
        == "LaunchError: there is no GPU here. Say how many ranks run on the CPU: --cpus 2, or cpus=2 in launch"
    )


IN_USE = {"0": "one (one.stop() ends it)", "1": "one (one.stop() ends it)", "3": "kept ranks (%ddp stop ends them)"}


@pytest.mark.parametrize(
    ("options", "env", "there", "expected"),
    [
        # Free ones are taken; where the first ones are free, nothing is set.
        (Options(gpus=2), {}, 8, Devices(2, gpus=True, visible="2,4")),
        (Options(gpus=2), {"CUDA_VISIBLE_DEVICES": "5,4,3,0"}, 4, Devices(2, gpus=True)),
        (Options(gpus=1), {"CUDA_VISIBLE_DEVICES": "3,GPU-aa"}, 2, Devices(1, gpus=True, visible="GPU-aa")),
        (Options(gpu_ids=(2, 4)), {}, 8, Devices(2, gpus=True, visible="2,4")),
        # The numbers are those that the notebook gives them.
        (Options(gpu_ids=(0,)), {"CUDA_VISIBLE_DEVICES": "6,1"}, 2, Devices(1, gpus=True, visible="6")),
        (Options(gpus=2, share=True), {}, 8, Devices(2, gpus=True)),
        (Options(gpu_ids=(0, 2), share=True), {}, 8, Devices(2, gpus=True, visible="0,2")),
        (Options(share=True), {}, 4, Devices(4, gpus=True)),
        (Options(cpus=2), {}, 8, Devices(2, gpus=False)),
    ],
)
def test_gpus_of_other_runs_are_left_alone(
    options: Options, env: dict[str, str], there: int, expected: Devices
) -> None:
    assert choose(options, env, lambda: there, IN_USE) == expected


@pytest.mark.parametrize(
    ("options", "env", "there", "message"),
    [
        (
            Options(gpus=2),
            {},
            4,
            "--gpus 2: GPUs 0, 1, 3 are used by one (one.stop() ends it) and kept ranks (%ddp stop ends them), "
            "and 1 more is free; or give --share",
        ),
        (
            Options(gpus=1),
            {},
            2,
            "--gpus 1: GPUs 0, 1 are used by one (one.stop() ends it); or give --share",
        ),
        (Options(), {}, 8, "all GPUs: GPUs 0, 1, 3 are used by"),
        (
            Options(gpu_ids=(2, 3)),
            {},
            4,
            "--gpu-ids 2,3: GPU 3 is used by kept ranks (%ddp stop ends them); or give --share",
        ),
        (Options(gpu_ids=(1,)), {"CUDA_VISIBLE_DEVICES": "7,0"}, 2, "--gpu-ids 1: GPU 0 is used by one"),
        # Of this list CUDA sees two: the rest is not there to be free.
        (Options(gpus=2), {"CUDA_VISIBLE_DEVICES": "0,2,no,5"}, 2, "--gpus 2: GPU 0 is used by one"),
    ],
)
def test_gpus_of_other_runs_are_refused(options: Options, env: dict[str, str], there: int, message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        choose(options, env, lambda: there, IN_USE)
    assert str(caught.value).startswith(message)


def test_uuids_are_told_apart() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb,GPU-cc"}
    first = choose(Options(gpus=1), env, lambda: 3)
    used = dict.fromkeys(gpus_of(first, environment(env, Options(gpus=1), first)), "one")
    assert used == {"GPU-aa": "one"}
    second = choose(Options(gpus=2), env, lambda: 3, used)
    assert second.visible == "GPU-bb,GPU-cc"
    used |= dict.fromkeys(gpus_of(second, environment(env, Options(gpus=2), second)), "two")
    with pytest.raises(LaunchError, match="GPUs GPU-aa, GPU-bb, GPU-cc are used by one and two"):
        choose(Options(gpus=1), env, lambda: 3, used)
