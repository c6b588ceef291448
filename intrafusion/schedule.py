"""Training in parts, for networks, data sets and training functions of one's own.

The training images are split, a network is trained on each part at the same time, and the networks become one pruned
network: prune-and-fuse (PaF) or fuse-and-prune (FaP) of Theus et al. 2024, "Towards Meta-Pruning via Optimal
Transport".

>>> from intrafusion import schedule
>>> parts = schedule.split(labels, 2)                              # indices of the training images
>>> halves = schedule.train(fit, model, parts, "runs/halves")      # a process each; resumes
>>> network = schedule.prune_and_fuse(halves, prune, example_inputs)
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.average.networks import fuse
from intrafusion.training.state import TrainingFile, copied, digest
from intrafusion.training.workers import WorkerError, in_processes

__all__ = ["Fit", "Prune", "TrainingError", "fuse_and_prune", "prune_and_fuse", "split", "stratified", "train"]

_log = logging.getLogger(__name__)
Fit = Callable[[nn.Module, Tensor, Path], Any]
"""``(network, indices int64 [K], checkpoint)``: trains the network in place on the images at the indices."""
Prune = Callable[[nn.Module], nn.Module | None]
"""Prunes a network in place, or returns a pruned one."""


class TrainingError(RuntimeError):
    """The training of a part failed; ``part`` is its number, from 0."""

    def __init__(self, part: int, reason: str) -> None:
        super().__init__(f"part {part}: {reason}")
        self.part = part


def split(labels: Tensor | Sequence[int], parts: int = 2, *, overlap: float = 0.0, seed: int = 0) -> list[Tensor]:
    """Indices of the examples of each part: sorted int64 tensors, every class in proportion.

    labels: int64 [N], in the order of the data set. parts: how many. overlap: the share, in [0, 1], of every class of
    the other parts' examples that each part has too; without it the parts are disjoint and together all.

    The result depends on nothing but the arguments. Raises ValueError for a class with fewer examples than parts.
    """
    labels = torch.as_tensor(labels)
    if parts < 1 or not 0 <= overlap <= 1:
        raise ValueError(f"parts is {parts} and overlap is {overlap}: they must be at least 1, and in [0, 1]")
    for label, size in zip(*(values.tolist() for values in labels.unique(return_counts=True)), strict=True):
        if size < parts:
            raise ValueError(f"class {label} has {size} training images, too few for {parts} parts")
    own, rest = [], torch.arange(len(labels))
    for left in range(parts, 1, -1):
        kept, taken = stratified(labels[rest], 1 / left, seed=seed)
        own.append(rest[taken])
        rest = rest[kept]
    own = [rest, *reversed(own)]
    if not overlap:
        return own
    shared = []
    for number, part in enumerate(own):
        others = torch.cat(own[:number] + own[number + 1 :]).sort().values
        _, taken = stratified(labels[others], overlap, seed=seed + number + 1)
        shared.append(torch.cat([part, others[taken]]).sort().values)
    return shared


def stratified(labels: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices of ``labels`` (int64 ``[N]``) into two sorted parts, the second with ``share`` of every class.

    The number taken of a class is rounded; it depends on nothing but the labels, the share and the seed.
    """
    generator = np.random.default_rng(seed)
    taken = np.zeros(len(labels), dtype=bool)
    values = labels.numpy()
    for value in np.unique(values):
        members = np.flatnonzero(values == value)
        taken[generator.permutation(members)[: round(share * len(members))]] = True
    return torch.from_numpy(np.flatnonzero(~taken)), torch.from_numpy(np.flatnonzero(taken))


def train(
    fit: Fit, model: nn.Module | Sequence[nn.Module], parts: Iterable[Tensor], folder: Path | str, *, seed: int = 0,
    workers: int | None = None, threads: int | None = None,
) -> list[nn.Module]:  # fmt: skip
    """One network per part, each trained in a process of its own, at the same time; returned in eval mode.

    >>> def fit(model, indices, checkpoint):
    ...     loader = DataLoader(Subset(images(), indices.tolist()), batch_size=64, shuffle=True)
    ...     intrafusion.finetune(model, loader, epochs=10, lr=0.05, checkpoint=checkpoint)

    A script that calls this does so below ``if __name__ == "__main__":``, since every process imports it.

    Args:
        fit: called as ``fit(network, indices, checkpoint)``; a function of a module. Torch's, NumPy's and Python's
            generators are seeded with ``seed`` and the number of the part before. ``checkpoint`` is a file that it may
            keep its state in, to go on from after an interruption; it is removed when the part is finished.
        model: what all parts start from, or one network per part, of one architecture; not changed.
        parts: indices of each part's images, as from :func:`split`.
        folder: where each trained state is kept. A part that is there (of the same first weights, indices, seed and
            name of ``fit``) is not trained again.
        workers: processes at a time; ``None`` for one per GPU, or one per part, as far as there are processors.
        threads: torch's, in each process; ``None`` for an equal share of the processors.

    With GPUs each process has one, and its network is there; the networks come back on the devices of the first ones.

    Raises:
        TrainingError: naming the part, if ``fit`` raised or its process was killed. The others are ended; what is
            finished is kept, and the same call goes on.
        ValueError: there are not as many networks as parts, or ``fit`` cannot be sent to another process.
    """
    indices = [torch.as_tensor(part) for part in parts]
    networks = [copy.deepcopy(model) for _ in indices] if isinstance(model, nn.Module) else copy.deepcopy(list(model))
    if not indices or len(networks) != len(indices):
        raise ValueError(f"there are {len(networks)} networks for {len(indices)} parts: give one, or one per part")
    gpus = torch.cuda.device_count()
    processors = os.cpu_count() or 1
    workers = workers or min(len(indices), gpus or processors)
    threads = threads or max(1, processors // workers)
    Path(folder).mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(fit, copy.deepcopy(network).cpu(), rows, number, seed, threads, Path(folder))
        for number, (network, rows) in enumerate(zip(networks, indices, strict=True))
    ]
    missing = [job for job in jobs if job.trained() is None]
    finished = in_processes(_train_part, missing, workers=workers, gpus=gpus)
    try:
        with closing(finished):
            for number, _ in finished:
                _log.info("part %d of %d is trained", missing[number].part, len(jobs))
    except WorkerError as error:
        raise TrainingError(missing[error.number].part, error.reason) from None
    for network, job in zip(networks, jobs, strict=True):
        state = job.trained()
        if state is None:
            raise TrainingError(job.part, f"{job.file.path} is gone")
        network.load_state_dict(state)
        network.eval()
    return networks


def prune_and_fuse(
    models: Iterable[nn.Module], prune: Prune | Sequence[Prune], example_inputs: Any, **options: Any
) -> nn.Module:
    """PaF: a copy of each network is pruned, the pruned ones are aligned and averaged.

    prune: for all networks, or one for each (calibrated on the images of its part). options: of `intrafusion.fuse`.

    Returns a new network in eval mode; the networks given are not touched. Raises ValueError if there are not as many
    functions as networks, and what `prune` and `intrafusion.fuse` raise.
    """
    networks = list(models)
    prunes = [prune] * len(networks) if callable(prune) else list(prune)
    if len(prunes) != len(networks):
        raise ValueError(f"there are {len(prunes)} pruning functions for {len(networks)} networks: one, or one each")
    pruned = [_pruned(copy.deepcopy(network), each) for network, each in zip(networks, prunes, strict=True)]
    return fuse(pruned, example_inputs, **options)


def fuse_and_prune(models: Iterable[nn.Module], prune: Prune, example_inputs: Any, **options: Any) -> nn.Module:
    """FaP: the networks are aligned and averaged, and the result is pruned; see :func:`prune_and_fuse`."""
    return _pruned(fuse(models, example_inputs, **options), prune).eval()


def _pruned(model: nn.Module, prune: Prune) -> nn.Module:
    returned = prune(model)
    return returned if isinstance(returned, nn.Module) else model


@dataclass(frozen=True)
class _Job:
    """One part as another process needs it."""

    fit: Fit
    model: nn.Module
    indices: Tensor
    part: int
    seed: int
    threads: int
    folder: Path

    @property
    def key(self) -> str:
        rows = hashlib.sha256(self.indices.contiguous().numpy().tobytes()).hexdigest()
        name = getattr(self.fit, "__qualname__", repr(self.fit))
        return digest(self.model, repr((rows, self.part, self.seed, getattr(self.fit, "__module__", ""), name)))

    @property
    def file(self) -> TrainingFile:
        return TrainingFile(self.folder / f"part-{self.part}-{self.key}.pt", self.key)

    def trained(self) -> dict[str, Tensor] | None:
        """The state dict, if this part is finished."""
        return self.file.read()


def _train_part(job: _Job) -> None:
    torch.set_num_threads(job.threads)
    file, seed = job.file, job.seed * 100_003 + job.part
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        job.model.cuda()
    checkpoint = file.path.with_suffix(".checkpoint")
    job.fit(job.model, job.indices, checkpoint)
    file.write(lambda: copied(job.model.state_dict()), last=True)
    checkpoint.unlink(missing_ok=True)
