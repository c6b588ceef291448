"""The processes that train and evaluate one network together, one on each device: usually only this one.

``accelerate launch`` or ``torchrun`` starts the others; what they say to each other goes through Hugging Face
Accelerate. Whatever is written, printed or timed, the main process (rank 0) does alone.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)
"""How long the others wait for a process that decodes, times or writes; the launcher ends them if it dies."""
_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ProcessError(RuntimeError):
    """The processes cannot work together, or one of them failed."""


class Processes:
    """This process alone: there is nobody to share with.

    Every method that communicates must be called by all processes, in the same order.
    """

    index, count = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, prints and times."""
        return self.index == 0

    def share(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        """This process's part of a batch, and the weight of its mean loss in the mean loss of the batch.

        A batch of fewer than two images for each process is left whole, with the same weight everywhere: batch-norm
        needs more than one image.
        """
        if self.count == 1:
            return inputs, labels, 1.0
        if len(labels) < 2 * self.count:
            return inputs, labels, 1 / self.count
        part = labels.tensor_split(self.count)[self.index]
        return inputs.tensor_split(self.count)[self.index], part, len(part) / len(labels)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes; exact for integers."""
        return tensor

    def sum_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every parameter the sum of its gradients over the processes; without any it stays without."""

    def average_buffers_(self, model: nn.Module) -> None:
        """Give every floating-point buffer (the running statistics of batch-norm) its mean over the processes."""

    def agree_(self, model: nn.Module) -> None:
        """Give every process the weights and buffers of the main one.

        Raises:
            ProcessError: the networks differ in more than their numbers.
        """

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the main process, the only one that calls it.

        Raises:
            ProcessError: in the others, if ``make`` raised.
        """
        return make()

    def own_random(self, step: int, device: torch.device) -> AbstractContextManager[None]:
        """Random numbers of this process and step alone, as dropout needs them; afterwards all go on alike."""
        return nullcontext()

    def whole_batch_norm(self, model: nn.Module) -> AbstractContextManager[None]:
        """Batch-norms whose training statistics are of all processes' images, where torch has them: on GPUs."""
        return nullcontext()


ALONE = Processes()


class Launched(Processes):
    """One of several processes, as Accelerate's ``PartialState`` knows it."""

    def __init__(self, state: Any) -> None:
        self._state, self._operations = state, importlib.import_module("accelerate.utils")
        self.index, self.count = state.process_index, state.num_processes

    def sum(self, tensor: Tensor) -> Tensor:
        return self._operations.reduce(tensor.to(self._state.device), "sum").to(tensor.device)

    def sum_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        # A layer that is skipped at random may have a gradient here and none elsewhere: who has one goes along.
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([present, *(gradient.reshape(-1) for gradient in gradients)]))
        known, *sums = flat.split([len(parameters), *(p.numel() for p in parameters)])
        for parameter, gradient, total, some in zip(parameters, gradients, sums, known.tolist(), strict=True):
            if some:
                parameter.grad = gradient.copy_(total.view_as(gradient))

    def average_buffers_(self, model: nn.Module) -> None:
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        means = self.sum(torch.cat([buffer.reshape(-1) for buffer in buffers])) / self.count
        for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))

    def agree_(self, model: nn.Module) -> None:
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        shapes = [(name, tuple(value.shape), value.dtype) for name, value in state.items()]
        differing = self.sum(torch.tensor(int(shapes != self.from_main(lambda: shapes))))
        if differing:
            raise ProcessError(
                f"{int(differing)} of {self.count} processes have a network of other shapes than the main one: it was "
                "not made or pruned alike. Use the same devices and libraries everywhere, or a single process"
            )
        for value in state.values():
            sent = value.to(self._state.device, memory_format=torch.contiguous_format, copy=True)
            value.copy_(self._operations.broadcast(sent))

    def from_main(self, make: Callable[[], T]) -> T:
        answer: list[Any] = [None]
        failure = None
        if self.is_main:
            try:
                answer = [(make(), None)]
            except Exception as error:
                failure, answer = error, [(None, str(error) or type(error).__name__)]
        value, message = self._operations.broadcast_object_list(answer)[0]
        if failure is not None:
            raise failure
        if message is not None:
            raise ProcessError(f"the main process failed: {message}")
        return value

    @contextmanager
    def own_random(self, step: int, device: torch.device) -> Iterator[None]:
        seed = torch.initial_seed() + 1_000_003 * (step * self.count + self.index + 1)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed % 2**63)
            yield

    @contextmanager
    def whole_batch_norm(self, model: nn.Module) -> Iterator[None]:
        on_gpu = next(model.parameters()).is_cuda
        own = synchronise_batchnorms_(model) if on_gpu else {}
        try:
            yield
        finally:
            _put_back_(model, own)


def synchronise_batchnorms_(model: nn.Module) -> dict[str, nn.Module]:
    """Put torch's ``SyncBatchNorm`` on the tensors of every batch-norm; return the batch-norms by their names.

    Only torch's own: a subclass may do more than its base class. The network itself must not be a batch-norm.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    own = {name: module for name, module in modules if name and type(module) in _CONVERTED}
    shared = {id(module): module for module in own.values()}
    converted = {key: nn.SyncBatchNorm.convert_sync_batchnorm(module) for key, module in shared.items()}
    _put_back_(model, {name: converted[id(module)] for name, module in own.items()})
    return own


def _put_back_(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        module.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), leaf, module)


def launch() -> tuple[int, int]:
    """Which process this is of how many that a launcher started together: ``(0, 1)`` without one."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(rank), int(size)) if rank.isdigit() and size.isdigit() else (0, 1)


@contextmanager
def open_processes(*, cpu: bool = False) -> Iterator[Processes]:
    """The processes that were launched together, or :data:`ALONE`.

    Args:
        cpu: compute on processors even where there are GPUs; otherwise each process takes the GPU of its local rank.

    Raises:
        ProcessError: several were launched, and Accelerate is not installed or there are fewer GPUs.
    """
    _, count = launch()
    if count == 1:
        yield ALONE
        return
    try:
        accelerate: Any = importlib.import_module("accelerate")
    except ImportError:
        raise ProcessError(
            f"{count} processes were launched together, which needs the package accelerate: "
            "pip install 'intrafusion[accelerate]'; or start a single process"
        ) from None
    cpu = cpu or not torch.cuda.is_available()
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
    if not cpu and here > gpus:
        raise ProcessError(
            f"{here} processes were launched on this machine, which has {gpus} GPUs that torch can use: launch one "
            "process for each, or compute on the CPU (device=cpu)"
        )
    state = accelerate.PartialState(cpu=cpu, timeout=_PATIENCE)
    yield Launched(state)
    # After a failure the others are waiting for something else: then the launcher ends them.
    state.wait_for_everyone()
    state.destroy_process_group()
