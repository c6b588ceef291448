"""Several processes prune one network alike, or all of them fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import intrafusion
from intrafusion.training.distributed import broadcast_, together, world_size

ROOT = Path(intrafusion.__file__).parent.parent

MODES = ("agree", "differ", "fail")
SCRIPT = """
import json, os, sys, torch, torch.distributed as dist, torch_pruning as tp
from torch.nn.parallel import DistributedDataParallel
import intrafusion
from tests.nets import PICO

rank, modes = int(sys.argv[1]), sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
case = PICO[0]

def train(wrapped, optimizer):
    wrapped.train()
    wrapped(torch.randn(8, *case.shape, generator=torch.Generator().manual_seed(rank))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

def failing(group):
    raise ValueError("no score on this one")

def answer(mode):
    model = case.model()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(wrapped, optimizer)  # every process has seen other images: its batch-norm statistics are its own
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    if mode == "differ":
        metric = lambda group: torch.arange(len(group[0].idxs)).float() * (1 if rank else -1)
    if mode == "fail" and rank == 1:
        metric = failing
    pruner = intrafusion.IntraFusionPruner(
        model, case.example(), metric, ignored_layers=[model.fc2], fusion="barycentre"
    )
    schedule = intrafusion.FusionSchedule(pruner, optimizer, at=[1])
    before = str(model)
    try:
        schedule.step()
    except Exception as error:
        assert str(model) == before
        return f"error {error}"
    train(DistributedDataParallel(model), optimizer)
    return f"sum {sum(float(p.double().abs().sum()) for p in model.parameters()).hex()} {model.conv1.out_channels}"

print(json.dumps({mode: answer(mode) for mode in modes}))
# DistributedDataParallel keeps gloo's threads past destroy_process_group, and a thread that asks for the interpreter
# while it finalizes aborts the process (PyTorch's, not ours): it is not finalized
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each of two processes says in each mode; they are started once, for most of the time goes into that."""
    store = tmp_path_factory.mktemp("processes") / "store"

    def start(rank: int) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, str(rank), str(store), *MODES]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    with start(0) as first, start(1) as second:
        try:
            said = [process.communicate(timeout=300) for process in (first, second)]
        finally:
            first.kill()
            second.kill()
    for process, (_, err) in zip((first, second), said, strict=True):
        assert process.returncode == 0, err[-3000:]
    found = [json.loads(out) for out, _ in said]
    return {mode: [each[mode] for each in found] for mode in MODES}


def test_two_processes_prune_alike_and_train_on(answers):
    first, second = answers["agree"]
    assert first == second
    assert first.startswith("sum")
    assert first.endswith(" 4")


def test_different_choices_fail_in_both_processes_and_change_nothing(answers):
    for output in answers["differ"]:
        assert "the processes chose different channels" in output


def test_a_failure_in_one_process_fails_in_both(answers):
    first, second = answers["fail"]
    assert "pruning failed in another process (rank 1: no score on this one)" in first
    assert "no score on this one" in second


def test_in_one_process_nothing_is_exchanged():
    assert world_size() == 1
    value = torch.ones(3)
    broadcast_([value])
    done = []
    together(lambda: done.append(1), result=lambda: 0)
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 / 0, result=lambda: 0)
