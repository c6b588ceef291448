"""Several trained copies of one network become one: aligned, averaged, batch-norm put right."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops

from intrafusion.average.align import BY, align, check_network, check_same_tensors, same_shapes
from intrafusion.average.consensus import Consensus
from intrafusion.average.couplings import OUTPUT, Couplings, couplings_of
from intrafusion.average.orders import common_orders
from intrafusion.average.statistics import average_states, reestimate_
from intrafusion.correct.synthetic import NoSyntheticInputs, synthetic_count, synthetic_inputs
from intrafusion.groups.places import State, load_state_, permuted, state_of
from intrafusion.running import copy_of, input_batches, run_model, to_device

_log = logging.getLogger(__name__)

FUSE_BY = (*BY, "given")
"""How :func:`fuse` compares channels; `given` leaves them in the order they have."""

REPAIRS = ("refit", "statistics", "none")
"""What :func:`fuse` does about the average of filters that differ."""


def fuse(
    models: Iterable[nn.Module],
    example_inputs: Any,
    weights: Sequence[float] | None = None,
    *,
    by: str = "matching",
    batches: Iterable | None = None,
    repair: str = "refit",
    forward_fn: Callable | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """One network from several trained copies: each aligned to the mean of the others until no channel moves, averaged.

    >>> fused = intrafusion.fuse([model_a, model_b], torch.randn(1, 3, 32, 32), batches=unlabelled)

    models: networks of one architecture, in any order: the result does not depend on it. If their widths differ, the
        wider are first brought to those of the one with the fewest parameters (see `average.align`).
    example_inputs: a tensor with its batch axis, or a tuple or dictionary of inputs. forward_fn(network, inputs): how
        to call the networks, if not with the inputs.
    weights: one number >= 0 per network, scaled to sum to 1; None for equal ones.
    by: `weights`, `activations` or `matching`, as for :func:`align`, or `given`: the channels as they are.
    batches: unlabelled batches of inputs for the repair (and to compare activations on). Few of them are filled up with
        synthetic inputs, and none replaced, if the networks have batch-norms that synthetic images can be matched to.
    repair: `refit`: every layer gives what the aligned networks give on average, by ridge regression, one layer after
        the other (`average.consensus`); without inputs as with `statistics`.
        `statistics`: batch-norms alone, re-estimated on the batches, or in closed form from the networks and their
        filters (`average.statistics`). `none`: their statistics are averaged.
    seed: of the order in which groups are visited, and of synthetic inputs. progress: show bars, on a terminal only.

    Returns a new network in eval mode, on the device of the one with the fewest parameters. The networks given are not
    touched. Raises TypeError or ValueError naming the network (by its place in the list), tensor or group: no networks,
    something that is no network, other architectures, NaN, weights that mean nothing.
    """
    if repair not in REPAIRS:
        raise ValueError(f"repair is {repair!r}: choose one of {', '.join(map(repr, REPAIRS))}")
    networks, shares, given = _checked(models, weights, by, batches)
    networks, shares = _in_canonical_order(networks, shares)
    networks = _of_one_width(networks, example_inputs, by, given, forward_fn, seed)
    reference = networks[0]
    device = next(iter(state_of(reference).values())).device
    states = [{key: tensor.to(device) for key, tensor in state_of(network).items()} for network in networks]
    couplings = couplings_of(reference, example_inputs, forward_fn=forward_fn)
    run = partial(run_model, forward_fn=forward_fn)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if by != "given":
        _log_fixed(couplings)
        orders = common_orders(networks, states, shares, couplings, run, given or [inputs], by=by, seed=seed)
        states = [permuted(state, couplings.groups, order) for state, order in zip(states, orders, strict=True)]
    fused = copy_of(reference).eval()
    load_state_(fused, average_states(states, shares, couplings, repair=repair != "none"))
    given = [to_device(batch, device) for batch in given]
    if given and repair != "none":
        reestimate_(fused, run, given)
    if repair == "refit" and len(networks) > 1:
        parents = [_like(fused, state) for state in states]
        drawn = _synthetic(parents, inputs, run, given, seed, progress)
        if given or drawn:
            Consensus(fused, parents, shares, couplings, run, [*given, *drawn]).refit_(progress)
    return fused


def _like(network: nn.Module, state: State) -> nn.Module:
    made = copy_of(network)
    load_state_(made, state)
    return made.requires_grad_(False)


def _synthetic(
    networks: Sequence[nn.Module], example: Any, run: Callable, given: list, seed: int, progress: bool
) -> list[Any]:
    """Inputs that fill up the given ones, as many of each network; none where batch-norms cannot say what they read."""
    if not any(isinstance(module, ops.TORCH_BATCHNORM) for module in networks[0].modules()):
        return []
    count = -(-synthetic_count(networks[0], example, given) // len(networks))
    if not count:
        return []
    try:
        return [
            batch
            for number, network in enumerate(networks)
            for batch in synthetic_inputs(network, example, run, count=count, seed=seed + number, progress=progress)
        ]
    except NoSyntheticInputs:
        return []


def _checked(
    models: Any, weights: Sequence[float] | None, by: str, batches: Iterable | None
) -> tuple[list[nn.Module], list[float], list]:
    if by not in FUSE_BY:
        raise ValueError(f"by is {by!r}: choose one of {', '.join(map(repr, FUSE_BY))}")
    if isinstance(models, nn.Module):
        raise TypeError("models must be a list of networks, not one network")
    networks = list(models)
    if not networks:
        raise ValueError("there are no networks to fuse: give a list of at least one")
    for number, network in enumerate(networks):
        check_network(network, f"network {number}")
    for number, network in enumerate(networks[1:], start=1):
        check_same_tensors(state_of(networks[0]), state_of(network), "network 0", f"network {number}")
    shares = [1.0] * len(networks) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(networks):
        raise ValueError(f"there are {len(shares)} weights for {len(networks)} networks")
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares) > 0:
        raise ValueError(f"weights must be numbers >= 0, and not all 0: {shares}")
    kept = [(network, share) for network, share in zip(networks, shares, strict=True) if share > 0]
    total = math.fsum(shares)
    given = [] if batches is None else input_batches(batches)
    return [network for network, _ in kept], [share / total for _, share in kept], given


def _in_canonical_order(networks: list[nn.Module], shares: list[float]) -> tuple[list[nn.Module], list[float]]:
    """By number of parameters, then weight, then content: an order that the caller's does not matter to."""

    def key(at: int) -> tuple[int, float, str]:
        return sum(p.numel() for p in networks[at].parameters()), -shares[at], _digest(networks[at])

    order = sorted(range(len(networks)), key=key)
    return [networks[at] for at in order], [shares[at] for at in order]


def _digest(model: nn.Module) -> str:
    content = hashlib.sha256()
    for name, tensor in state_of(model).items():
        content.update(name.encode())
        content.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def _of_one_width(
    networks: list[nn.Module], example: Any, by: str, batches: list, forward_fn: Callable | None, seed: int
) -> list[nn.Module]:
    reference, same = networks[0], []
    for network in networks:
        if not same_shapes(state_of(network), state_of(reference)):
            if by == "given":
                raise ValueError("the networks have different widths: their channels cannot stay as given")
            options: dict[str, Any] = {"by": by, "batches": batches or None, "forward_fn": forward_fn, "seed": seed}
            network = align(network, reference, example, **options).apply(network)
        same.append(network)
    return same


def _log_fixed(couplings: Couplings) -> None:
    for group in couplings.groups:
        if group.reason and group.reason != OUTPUT:
            _log.info("group %r is averaged in the given order: %s", group.name, group.reason)
