"""Several processes train one network: all of them must prune it alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def check_unsharded(model: nn.Module) -> None:
    """Raises ValueError for a network whose parameters are spread over devices (FSDP, tensor parallelism)."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements") or type(parameter).__name__ == "FlatParameter":
            raise ValueError(f"parameter {name!r} is sharded over several devices: sharded networks cannot be pruned")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give all processes what rank 0 has; nothing to do for one process."""
    if world_size() == 1:
        return
    for tensor in tensors:
        value = tensor.detach().contiguous().clone()
        dist.broadcast(value, src=0)
        tensor.data.copy_(value)


def together(action: Callable[[], Any], result: Callable[[], Any]) -> None:
    """Run `action`; if it fails in one process, or `result()` differs between them, it fails in all.

    Raises what `action` raised here, or RuntimeError.
    """
    error = None
    try:
        action()
    except Exception as caught:
        error = caught
    if world_size() > 1:
        answers: list[Any] = [None] * world_size()
        dist.all_gather_object(answers, ("failed", str(error)) if error else ("done", result()))
        if error is None and any(answer != answers[0] for answer in answers):
            failed = [f"rank {rank}: {what}" for rank, (how, what) in enumerate(answers) if how == "failed"]
            reason = "; ".join(failed) or "the processes chose different channels, so their networks are not equal"
            raise RuntimeError(f"pruning failed in another process ({reason})")
    if error is not None:
        raise error
