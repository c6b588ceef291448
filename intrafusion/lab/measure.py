"""Accuracy, operations, size, memory and latency of a network."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.weights import to_bytes
from intrafusion.training.processes import ALONE, Processes

LATENCY_BATCHES = (1, 64)
MEMORY_BATCH = 64
_LONGEST_TIMING = 0.5  # seconds per batch size; a slower network is still run four times
_TURNS = 3


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``total`` images; integers, so that nothing depends on the size of a batch."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        """In per cent; nan for no images."""
        return 100 * self.correct / self.total if self.total else float("nan")

    def __str__(self) -> str:
        return f"{self.percent:.2f} %"


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass of ``batch`` images: median and interquartile range, on what and how many threads."""

    batch: int
    median: float
    iqr: float
    device: str
    threads: int


def evaluate(
    model: nn.Module, data: Dataset, split: str = "test", *, batch_size: int = 500, progress: bool = True,
    processes: Processes = ALONE,
) -> Accuracy:  # fmt: skip
    """Count the images of a split whose label has the largest logit, as :func:`places` finds them."""
    place = places(model, data, split, batch_size=batch_size, progress=progress, processes=processes)
    return Accuracy(int((place == 0).sum()), len(place))


def hits(
    model: nn.Module, data: Dataset, split: str = "test", *, batch_size: int = 500, progress: bool = True
) -> Tensor:
    """Which images of a split have the largest logit at their label: bool ``[N]``, as :func:`places` finds them."""
    return places(model, data, split, batch_size=batch_size, progress=progress) == 0


def places(
    model: nn.Module, data: Dataset, split: str = "test", *, batch_size: int = 500, progress: bool = True,
    processes: Processes = ALONE,
) -> Tensor:  # fmt: skip
    """How many classes come before the label when logits are sorted: int64 ``[N]``, on the CPU, in the split's order.

    Of equal logits the first class comes first, and nan before any number, as in ``argmax``. The network is in eval
    mode while it is measured and gets its modes back afterwards. Several processes take the batches in turns: each
    batch is what it would be for one of them, so the numbers are the same, and all have all of them in the end.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = len(data.split(split))
    starts = range(0, total, batch_size)[processes.index :: processes.count]
    found = torch.zeros(total, dtype=torch.int64)
    batches = data.batches(split, batch_size, device=device, turn=(processes.index, processes.count))
    try:
        with torch.no_grad():
            bar = tqdm(batches, desc=f"evaluate {split}", total=len(starts), delay=2, leave=False,
                       disable=None if progress and processes.is_main else True)  # fmt: skip
            for start, (images, labels) in zip(starts, bar, strict=True):
                order = model(images).sort(dim=1, descending=True, stable=True).indices
                found[start : start + len(labels)] = (order == labels[:, None]).int().argmax(1).cpu()
    finally:
        for module, training in modes:
            module.training = training
    return processes.sum(found)


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one forward pass of ``example`` (``[1, C, H, W]``): convolutions and matrix products.

    Those of attention are counted too: it is computed from its matrix products, without the fused kernels that a
    counter does not see.
    """
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def count_parameters(model: nn.Module) -> int:
    """Scalar parameters; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the safetensors file of the state dict."""
    return len(to_bytes(model))


def peak_memory(model: nn.Module, example: Tensor, batch: int = MEMORY_BATCH) -> int | None:
    """Bytes that one forward pass of ``batch`` images takes on a GPU beyond weights and images; ``None`` on a CPU."""
    if not example.is_cuda:
        return None
    images = _repeated(example, batch)
    torch.cuda.synchronize(example.device)
    torch.cuda.reset_peak_memory_stats(example.device)
    before = torch.cuda.memory_allocated(example.device)
    with torch.no_grad():
        model(images)
    return torch.cuda.max_memory_allocated(example.device) - before


def measure_latency(model: nn.Module, example: Tensor, batch: int) -> Latency:
    """Time forward passes of ``batch`` images on the device of ``example`` ``[1, C, H, W]``, on torch's threads."""
    threads = torch.get_num_threads()
    variables = {"model": model, "images": _repeated(example, batch)}
    with torch.no_grad():
        timer = _timer_class()("model(images)", globals=variables, num_threads=threads)
        timed = timer.adaptive_autorange(max_run_time=_LONGEST_TIMING)
    return Latency(batch, timed.median, timed.iqr, device_name(example.device), threads)


def latency_share(model: nn.Module, dense: nn.Module, example: Tensor, batch: int) -> float:
    """How much of ``dense``'s latency ``model`` has: both are timed in turns, so that a busy machine slows both."""
    pairs = [[measure_latency(each, example, batch).median for each in (model, dense)] for _ in range(_TURNS)]
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    return ours / theirs


def _timer_class() -> Any:
    """torch's timer, which loads the compiler tools of torch; they complain where there is CUDA but no card."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.setLevel(level)
    return Timer


def device_name(device: torch.device) -> str:
    """What the graphics card or the processor calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _repeated(example: Tensor, batch: int) -> Tensor:
    return example.repeat(batch, *[1] * (example.dim() - 1))
