"""One plain training loop: what dense training and fine-tuning share, seeded, and resumable after every epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from intrafusion.training.fusion_schedule import FusionSchedule
from intrafusion.training.noise_scale import (
    NoiseHistory,
    NoisyEpoch,
    definition,
    gradient_trace,
    held_out_batches,
    noise_scale,
)
from intrafusion.training.processes import ALONE, Processes
from intrafusion.training.seeds import as_before, seeded
from intrafusion.training.settings import Training, lr_factor, make_optimizer
from intrafusion.training.state import TrainingFile, copied, digest

_log = logging.getLogger(__name__)
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(model, inputs, labels) -> mean loss`` of a batch; the forward pass is its own."""
Evaluation = Callable[[nn.Module, int], Mapping[str, float]]
"""``(model in eval mode, epochs done) -> scores by name``; the epoch with the largest ``"validation"`` is the best."""
Scheduling = Callable[[torch.optim.Optimizer, AveragedModel | None], FusionSchedule]
"""``(optimizer, moving average of the weights) -> `` when the network is pruned, in optimizer steps."""


class Batches(Protocol):
    """``(inputs, labels)`` batches that can be gone through again and again: a ``DataLoader``, or a list."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class DivergedError(RuntimeError):
    """The loss is no longer finite."""

    def __init__(self, epoch: int, loss: float, lr: float) -> None:
        super().__init__(f"training diverged in epoch {epoch} (loss {loss}); lower lr ({lr:g})")
        self.epoch, self.loss = epoch, loss


@dataclass(frozen=True)
class History:
    """What happened in training, epoch by epoch.

    Attributes:
        losses: mean training loss of epochs 1, 2, ...
        scores: what the evaluation said before the first step (epoch 0) and after every epoch; empty without one.
        best: the epoch with the largest validation score (of several the last, which was trained longest), whose
            weights the network has; without validation scores the last epoch.
        noise: learning rate, effective noise scale and the size of the gradient's noise, epoch by epoch; epochs that an
            older version of this package trained, before an interruption, are not in it.
    """

    losses: tuple[float, ...]
    scores: tuple[Mapping[str, float], ...]
    best: int
    noise: NoiseHistory | None = None

    @property
    def validation(self) -> tuple[float, ...]:
        """Validation scores from epoch 0 on, where there are any."""
        return tuple(score["validation"] for score in self.scores if "validation" in score)


def fit_(
    model: nn.Module, batches: Batches, training: Training, *, objective: Objective | None = None,
    evaluation: Evaluation | None = None, held_out: Iterable[Any] | None = None, checkpoint: Path | None = None,
    key: str = "", progress: bool = True, title: str = "train", processes: Processes = ALONE,
    scheduling: Scheduling | None = None,
) -> History:  # fmt: skip
    """Train ``model`` in place and leave it in eval mode, at its best validation epoch if there is one.

    Everything random in an epoch (the order of a shuffling ``DataLoader``, augmentation, dropout) draws from torch's
    generators, which are seeded with ``training.seed`` and the number of the epoch, and are as they were afterwards.

    Args:
        batches: moved to the network's device; a ``generator`` attribute is part of what is resumed.
        objective: the mean loss of a batch; ``None`` for cross-entropy with ``training.label_smoothing``.
        evaluation: called before the first step and after every epoch.
        held_out: ``(inputs, labels)`` batches in a random order, not augmented; on the first 64 images the covariance
            of the gradient is measured after every epoch, which changes nothing else, random states included.
        checkpoint: file that is rewritten after every epoch (more rarely where writing takes long) and from which the
            same training goes on: the same weights, settings, number of batches and ``key``. On a CPU the result is
            that of a training that was never interrupted, bit for bit. The caller removes it.
        key: whatever else the result depends on, such as a digest of the images.
        processes: who trains together. All are given the same ``batches`` and work on a share of each, so that a step
            is that of one process up to rounding; on CPUs each has the batch-norm statistics of its share. They start
            from the main process's network and end with one and the same; ``checkpoint`` is written by the main one.
        scheduling: makes what prunes ``model`` on the way; epochs before the last pruning step are never the best.

    Raises:
        DivergedError: the loss is no longer finite.
        intrafusion.FusionError: a group cannot be pruned.
        ValueError: nothing can be trained, or ``fp16`` is asked for without a GPU.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the network has no parameter that requires a gradient, so there is nothing to train")
    if len(batches) == 0:
        raise ValueError("there are no training batches")
    device = parameters[0].device
    if training.amp == "fp16" and device.type != "cuda":
        raise ValueError("amp='fp16' needs a GPU; use 'bf16' or 'none' on a CPU")
    processes.agree_(model)
    file = None if checkpoint is None else TrainingFile(checkpoint, _identity(model, batches, training, key))
    if training.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        run = _Run(model, batches, training, parameters, device, objective, evaluation, held_out, processes, scheduling)
        with processes.whole_batch_norm(model):
            _train_(run, file, progress and processes.is_main, title)
        return run.finish()
    finally:
        if training.channels_last:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _train_(run: _Run, file: TrainingFile | None, progress: bool, title: str) -> None:
    training, batches = run.training, run.batches
    if file is not None and (state := run.processes.from_main(file.read)) is not None:
        run.load_state_dict(state)
        _log.info("%s: resumed after epoch %d of %d", title, run.epoch, training.epochs)
    total = training.epochs * len(batches)
    bar = tqdm(total=total, initial=run.epoch * len(batches), desc=title, unit=" steps", delay=1, leave=False,
               disable=None if progress else True)  # fmt: skip
    with bar, torch.enable_grad():
        if run.epoch == 0:
            run.evaluate()
        while run.epoch < training.epochs:
            with seeded(training.seed, run.epoch, run.device):
                run.train_epoch(bar)
            run.measure_noise()
            run.evaluate()
            bar.set_postfix(epoch=run.epoch, loss=f"{run.losses[-1]:.4f}")
            if file is not None and run.processes.is_main:
                file.write(run.state_dict, last=run.epoch == training.epochs)


class _Run:
    """A training under way: everything that changes from epoch to epoch."""

    def __init__(
        self, model: nn.Module, batches: Batches, training: Training, parameters: list[nn.Parameter],
        device: torch.device, objective: Objective | None, evaluation: Evaluation | None,
        held_out: Iterable[Any] | None, processes: Processes, scheduling: Scheduling | None,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.training, self.parameters = model, batches, training, parameters
        self.device, self.evaluation, self.processes = device, evaluation, processes
        self.objective = objective or _cross_entropy(training.label_smoothing)
        self.optimizer = make_optimizer(parameters, training)
        self.scaler = torch.amp.GradScaler(device.type, enabled=training.amp == "fp16")
        self.average: AveragedModel | None = None
        if training.ema is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.ema), use_buffers=True)
            self.average.n_averaged += 1  # the average starts from the network as it is
        self.schedule = None if scheduling is None else scheduling(self.optimizer, self.average)
        self.epoch, self.best_epoch = 0, 0
        self.losses: list[float] = []
        self.scores: list[dict[str, float]] = []
        self.best: dict[str, Tensor] | None = None
        self.noise: list[NoisyEpoch] = []
        self.held_out: list[tuple[Tensor, Tensor]] = []
        if held_out is not None:
            with as_before(held_out, training.seed, device):
                self.held_out = [(x.to(device), y.to(device)) for x, y in held_out_batches(held_out)]

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the moving average, if there is one."""
        return self.model if self.average is None else self.average.module

    def train_epoch(self, bar: tqdm) -> None:
        """One pass over the batches."""
        training, per_epoch = self.training, -(-len(self.batches) // self.training.accumulate)
        self.model.train()
        losses: list[float] = []
        rates: list[float] = []
        scales: list[float] = []
        for index, group in enumerate(_groups(self.batches, training.accumulate)):
            step = self.epoch * per_epoch + index
            rates.append(training.lr * lr_factor(training, step, per_epoch))
            scales.append(noise_scale(training, rates[-1], sum(len(labels) for _, labels in group)))
            for settings in self.optimizer.param_groups:
                settings["lr"] = rates[-1]
            with self.processes.own_random(step, self.device):
                losses.append(self._update(group))
            if self.average is not None:
                _average_(self.average, self.model)
            if self.schedule is not None and self.schedule.step():
                self._find_parameters()
            bar.update(len(group))
        losses = self.processes.sum(torch.tensor(losses, dtype=torch.float64)).tolist()
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            raise DivergedError(self.epoch + 1, mean, training.lr)
        self.processes.average_buffers_(self.model)
        if self.average is not None:
            self.processes.average_buffers_(self.average.module)
        self.losses.append(mean)
        self.epoch += 1
        self.noise.append(NoisyEpoch(self.epoch, sum(rates) / len(rates), sum(scales) / len(scales)))

    def _find_parameters(self) -> None:
        """Pruning puts others in the place of the network's parameters."""
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _update(self, group: Sequence[tuple[Tensor, Tensor]]) -> float:
        """One step of the optimizer on the mean loss of all images of some batches; this process's part of it."""
        count = sum(len(labels) for _, labels in group)
        total = 0.0
        self.optimizer.zero_grad()
        for inputs, labels in group:
            size = len(labels)
            inputs, labels, weight = self.processes.share(inputs, labels)
            inputs, labels = inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            if self.training.channels_last and inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with self._autocast():
                loss = self.objective(self.model, inputs, labels)
            part = loss * (weight * size / count)
            self.scaler.scale(part).backward()
            total += part.item()
        self.processes.sum_gradients_(self.parameters)
        if self.training.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.training.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def _autocast(self) -> torch.autocast:
        kind = torch.float16 if self.training.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, kind, enabled=self.training.amp != "none")

    def measure_noise(self) -> None:
        """Note how noisy the gradient is at the weights that the epoch ended with."""
        if not self.held_out:
            return
        try:
            with seeded(self.training.seed, self.epoch, self.device):
                trace = gradient_trace(self.model, self.held_out, self.objective)
        except RuntimeError as error:  # no memory, or layers without a backward pass in eval mode: not worth a training
            _log.warning("the gradient's noise is not measured: %s", error)
            self.held_out = []
            return
        self.noise[-1] = replace(self.noise[-1], trace=trace if math.isfinite(trace) else None)

    def evaluate(self) -> None:
        """Note the scores of the epoch, and keep the weights if they are the best so far."""
        if self.evaluation is None:
            return
        network = self.evaluated.eval()
        with torch.no_grad():
            scores = dict(self.evaluation(network, self.epoch))
        self.scores.append(scores)
        value = scores.get("validation")
        if value is None or (self.schedule is not None and not self.schedule.finished):
            return
        if self.best is None or value >= self.scores[self.best_epoch]["validation"]:
            self.best_epoch, self.best = self.epoch, copied(network.state_dict())

    def finish(self) -> History:
        """Give the network its final weights."""
        if self.best is not None:
            self.model.load_state_dict(self.best)
        elif self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        best = self.best_epoch if self.best is not None else self.epoch
        noise = NoiseHistory(definition(self.training), self.training.weight_decay, epochs=tuple(self.noise))
        return History(tuple(self.losses), tuple(self.scores), best, noise if self.noise else None)

    def state_dict(self) -> dict[str, Any]:
        """Everything the coming epochs depend on, as tensors and plain values."""
        generator = getattr(self.batches, "generator", None)
        return {
            "epoch": self.epoch,
            "losses": self.losses,
            "scores": self.scores,
            "noise": [asdict(epoch) for epoch in self.noise],
            "best_epoch": self.best_epoch,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where :meth:`state_dict` was taken."""
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
            self._find_parameters()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        generator = getattr(self.batches, "generator", None)
        if generator is not None and state["generator"] is not None:
            generator.set_state(state["generator"])
        self.epoch, self.best_epoch, self.best = state["epoch"], state["best_epoch"], state["best"]
        self.losses, self.scores = list(state["losses"]), list(state["scores"])
        self.noise = [NoisyEpoch(**epoch) for epoch in state.get("noise", ())]  # older files have none


def _average_(average: AveragedModel, model: nn.Module) -> None:
    """Move the average towards the network; counters, which have no average, are copied."""
    average.update_parameters(model)
    for mean, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
        if not buffer.is_floating_point():
            mean.copy_(buffer)


def _cross_entropy(label_smoothing: float) -> Objective:
    return lambda model, inputs, labels: F.cross_entropy(model(inputs), labels, label_smoothing=label_smoothing)


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def _identity(model: nn.Module, batches: Batches, training: Training, key: str) -> str:
    settings = {item.name: getattr(training, item.name) for item in fields(training)}
    return digest(model, repr((sorted(settings.items()), len(batches), key, torch.__version__)))
