"""Several processes on one network: what each gets, and that together they do what one does."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion import cli
from intrafusion.lab.data.sources import digits
from intrafusion.lab.measure import evaluate, places
from intrafusion.models import DigitsCNN
from intrafusion.training.loop import fit_
from intrafusion.training.processes import (
    ALONE,
    ProcessError,
    Processes,
    launch,
    open_processes,
    synchronise_batchnorms_,
)
from intrafusion.training.settings import Training


def member(index: int, count: int) -> Processes:
    """One of several processes, as far as nothing is said."""
    found = Processes()
    found.index, found.count = index, count
    return found


@pytest.mark.parametrize(("size", "count"), [(4, 2), (7, 2), (64, 3), (11, 5)])
def test_shares_are_the_batch_and_their_losses_add_up_to_its_loss(size: int, count: int) -> None:
    inputs, labels = torch.arange(float(size))[:, None], torch.arange(size)
    shares = [member(index, count).share(inputs, labels) for index in range(count)]
    assert torch.equal(torch.cat([part for part, _, _ in shares]), inputs)
    assert torch.equal(torch.cat([part for _, part, _ in shares]), labels)
    assert min(len(part) for part, _, _ in shares) >= 2
    assert sum(part.mean() * weight for part, _, weight in shares) == pytest.approx(float(inputs.mean()))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_that_is_too_small_to_share_is_everyones(size: int) -> None:
    labels = torch.arange(size)
    for index in range(3):
        inputs, part, weight = member(index, 3).share(labels[:, None], labels)
        assert torch.equal(part, labels)
        assert len(inputs) == size
        assert weight == pytest.approx(1 / 3)


def test_alone_nothing_is_shared_copied_or_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(1, 3), torch.zeros(1)
    inputs, labels, weight = ALONE.share(x, y)
    assert inputs is x
    assert labels is y
    assert weight == 1
    assert ALONE.sum(x) is x
    assert ALONE.from_main(lambda: 3) == 3
    assert ALONE.is_main
    ALONE.agree_(model)
    ALONE.average_buffers_(model)
    ALONE.sum_gradients_(list(model.parameters()))
    random = torch.get_rng_state()
    with ALONE.whole_batch_norm(model), ALONE.own_random(0, torch.device("cpu")):
        assert type(model[1]) is nn.BatchNorm1d
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


class Own(nn.BatchNorm2d):
    """A batch-norm that does more, as timm's do."""


def test_synchronised_batchnorms_are_on_the_same_tensors() -> None:
    twice = nn.BatchNorm2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), twice, nn.Sequential(twice, Own(2)), nn.BatchNorm2d(2, affine=False))
    names, state = list(model.state_dict()), {k: v.data_ptr() for k, v in model.state_dict().items()}
    own = synchronise_batchnorms_(model)
    assert list(own) == ["1", "2.0", "3"]
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert model[2][0] is model[1]
    assert type(model[2][1]) is Own
    assert list(model.state_dict()) == names
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state


def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, size, expected in (("1", "4", (1, 4)), ("", "4", (0, 1)), ("0", "", (0, 1)), ("0", "1", (0, 1))):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert launch() == expected
    with open_processes() as processes:
        assert processes is ALONE


def test_several_processes_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ProcessError, match=r"2 processes were launched.*pip install 'intrafusion\[accelerate\]'"):
        open_processes().__enter__()


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="several processes are tested where accelerate is installed")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ProcessError, match="4 processes were launched on this machine, which has 3 GPUs"):
        open_processes().__enter__()


@pytest.mark.parametrize("command", [["sweep", "digits"], ["inspect", "digits"], ["report", "nowhere"], ["recipes"]])
def test_only_a_run_is_for_several_processes(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(command) == cli.USAGE
    reason = "a sweep runs its own processes" if command[0] == "sweep" else "only a run uses several processes"
    assert capsys.readouterr().err.startswith(f"intrafusion: error: {reason}: start ")


def test_the_first_process_of_a_machine_speaks_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_SPEAKING", 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local, says in (("0", "0", True), ("1", "1", False), ("2", "0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert cli.main(["run", "no_such_recipe"]) == cli.USAGE
        assert ("no recipe at 'no_such_recipe'" in capsys.readouterr().err) == says


class Net(nn.Module):
    """A convolution, perhaps a batch-norm and a dropout, and a linear layer."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.Identity() if plain else nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.0 if plain else 0.3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


def batches() -> list[tuple[Tensor, Tensor]]:
    """The last of them is too small to share."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 2, 5, 5, generator=generator)
    labels = (x.mean((1, 2, 3)) * 20).round().long() % 3
    return list(zip(x.split(7), labels.split(7), strict=True))


SETTINGS = (
    Training(epochs=2),
    Training(epochs=3, accumulate=2, clip_norm=0.5, ema=0.9, optimizer="adamw", lr=0.01),
    Training(epochs=2, accumulate=4, label_smoothing=0.1, channels_last=True),
)


def fitted(plain: bool, training: Training, processes: Processes = ALONE, **options) -> tuple[dict, tuple]:
    model = Net(plain=plain)
    history = fit_(model, batches(), training, progress=False, processes=processes, **options)
    return {name: value.clone() for name, value in model.state_dict().items()}, history.losses


def same_everywhere(processes: Processes, state: dict[str, Tensor]) -> bool:
    main = processes.from_main(lambda: state)
    return all(torch.equal(main[name], value) for name, value in state.items())


def check_training(processes: Processes, folder: Path) -> None:
    for training in SETTINGS:
        for plain in (True, False):
            state, losses = fitted(plain, training, processes)
            assert same_everywhere(processes, state)
            alone, expected = fitted(plain, training)
            assert losses == pytest.approx(expected, rel=1e-5 if plain else 0.1)
            assert all(torch.allclose(state[k], alone[k], atol=1e-5 if plain else 0.3) for k in state)
    drawn = []
    for _ in range(2):
        with processes.own_random(3, torch.device("cpu")):
            drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    others = processes.sum(drawn[0]) - drawn[0]
    assert not torch.equal(others, drawn[0])


def check_resuming(processes: Processes, folder: Path) -> None:
    class Cut(Exception):
        pass

    def cut(_: nn.Module, epoch: int) -> dict[str, float]:
        if epoch == 2:
            raise Cut
        return {}

    training, file = Training(epochs=3), folder / "state.pt"
    whole, _ = fitted(False, training, processes, evaluation=lambda *_: {})
    for evaluation, error in ((cut, pytest.raises(Cut)), (lambda *_: {}, nullcontext())):
        with error:
            resumed, _ = fitted(False, training, processes, evaluation=evaluation, checkpoint=file)
    assert file.is_file()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def check_measuring(processes: Processes, folder: Path) -> None:
    torch.manual_seed(0)
    model, data = DigitsCNN(widths=(4, 4, 4)), digits()
    for size in (100, 77, 1000):
        expected = places(model, data, batch_size=size, progress=False)
        assert torch.equal(places(model, data, batch_size=size, progress=False, processes=processes), expected)
    assert evaluate(model, data, processes=processes) == evaluate(model, data)


def check_speaking(processes: Processes, folder: Path) -> None:
    assert processes.from_main(lambda: processes.index) == 0
    with pytest.raises(ZeroDivisionError if processes.is_main else ProcessError, match="by zero"):
        processes.from_main(lambda: 1 // 0)
    layers = [nn.Linear(1, 1) for _ in range(3)]
    layers[processes.index](torch.ones(1, 1)).backward()  # the last is used by no process
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    processes.sum_gradients_(parameters)
    assert [None if p.grad is None else float(p.grad) for p in parameters] == [1, 1, 1, 1, None, None]
    torch.manual_seed(processes.index)
    model = Net(plain=False).to(memory_format=torch.channels_last)
    model.conv.weight.data.normal_()
    processes.agree_(model)
    assert same_everywhere(processes, model.state_dict())
    with pytest.raises(ProcessError, match="1 of 2 processes have a network of other shapes"):
        processes.agree_(nn.Linear(2, 1 + processes.index))


CHECKS: tuple[Callable[[Processes, Path], None], ...] = (
    check_training,
    check_resuming,
    check_measuring,
    check_speaking,
)


def one_of_two(rank: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    with open_processes(cpu=True) as processes:
        assert (processes.index, processes.count) == (rank, 2)
        for check in CHECKS:
            check(processes, folder)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="several processes are tested where accelerate is installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, tmp_path), nprocs=2)


RECIPE = """\
model: {name: digits_cnn}
data: {name: digits, batch_size: 100}
train: {epochs: 1, batch_size: 64, lr: 0.1}
prune: {ratios: [0.25], ignored: [classifier]}
fusion: paper
finetune: {epochs: 1, lr: 0.02, batch_size: 64}
device: cpu
output: out
"""


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_launched_run_has_the_rows_of_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], short_timing: None
) -> None:
    pytest.importorskip("accelerate", reason="several processes are tested where accelerate is installed")
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    root = Path(cli.__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "intrafusion.cli"]
    launched = subprocess.run(
        [sys.executable, "-m", *command, "run", "r.yaml"], env=environment, capture_output=True, text=True
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("digits_cnn on digits") == launched.stdout.count("report: out/report.md") == 1
    assert launched.stderr.count("dense: ") == 1
    assert json.loads(Path("out/environment.json").read_text())["processes"] == "2"
    assert not Path("out/checkpoints").exists()
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 5
    together = rows(Path("out"))

    assert cli.main(["run", "r.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 0
    assert cli.main(["run", "r.yaml", "--fresh"]) == 0  # the trained network stays
    assert "processes" not in json.loads(Path("out/environment.json").read_text())
    for ours, theirs in zip(together, rows(Path("out")), strict=True):
        for name in ours:
            if name in ("correct", "top1", "accuracy") and ours["stage"] == "finetuned":
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=0.1)
            elif ours["stage"] != "finetuned" and not name.startswith(("seconds", "latency", "size")):
                assert ours[name] == theirs[name], name
