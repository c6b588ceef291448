"""What the layers of a network read on given inputs: first and second moments, of all layers in one pass.

The layers that read a group's channels are asked one group after the other. The pass that the first one needs measures
every layer, and what it found is kept for the others, until the network changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.groups.kinds.base import LayerKind, Slot, kind_of
from intrafusion.groups.kinds.filters import Filters
from intrafusion.groups.layout import by_channel
from intrafusion.running import evaluating

WIDEST = 4096
"""A layer that reads more channels than this is measured for one group at a time, if products of channels are wanted:
behind a flatten, a group has far fewer channels than the layer reads values."""
MOST_VALUES = 2**28
"""As many products of channels are held for all layers together (2 GB); layers beyond have a pass of their own."""
_AT_ONCE = 2**22
"""Values that are counted at a time (32 MB)."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Sums over all places: of each value [n, m], of its square [n, m], and of products of channels [n, n] (or None).

    m: copies of a channel that a layer reads (1, unless it is behind a flatten, say); a product is of the same copy of
    both channels, summed over the copies. finite: False if some value was not.
    """

    count: int
    sums: Tensor
    squares: Tensor
    products: Tensor | None
    finite: bool = True

    @classmethod
    def of(cls, values: Tensor, local: Tensor | None, products: bool) -> Reading:
        """values: [places, d]; local: as in `Slot`, None if all d are to be counted as they are."""
        width = values.shape[1] if local is None else local.numel()
        parts = [cls._of(part.double(), local, products) for part in values.split(max(1, _AT_ONCE // max(1, width)))]
        return sum(parts[1:], start=parts[0])

    @classmethod
    def _of(cls, values: Tensor, local: Tensor | None, products: bool) -> Reading:
        finite = bool(torch.isfinite(values).all())
        if local is None:
            gram = values.T @ values if products else None
            return cls(len(values), values.sum(0)[:, None], values.square().sum(0)[:, None], gram, finite)
        local = local.to(values.device)
        copies = values[:, local.clamp(min=0)] * (local >= 0)  # [places, n, m]
        gram = torch.einsum("snm,skm->nk", copies, copies) if products else None
        return cls(len(values), copies.sum(0), copies.square().sum(0), gram, finite)

    def __add__(self, other: Reading) -> Reading:
        products = None
        if self.products is not None and other.products is not None:
            products = self.products + other.products
        return Reading(
            self.count + other.count,
            self.sums + other.sums,
            self.squares + other.squares,
            products,
            self.finite and other.finite,
        )

    def at(self, local: Tensor) -> Reading:
        """The same in the coordinates of a group, of a layer that was counted as it is."""
        local = local.to(self.sums.device)
        if local.shape == self.sums.shape and torch.equal(local[:, 0], torch.arange(len(local)).to(local)):
            return self
        there = local >= 0
        places, products = local.clamp(min=0), self.products
        if products is not None:
            copies = zip(places.T, there.T, strict=True)
            products = torch.stack([products[at][:, at] * (on[:, None] & on) for at, on in copies]).sum(dim=0)
        sums, squares = self.sums[places, 0] * there, self.squares[places, 0] * there
        return Reading(self.count, sums, squares, products, self.finite)

    @property
    def mean_squares(self) -> Tensor:
        """[n, m]"""
        return self.squares / self.count

    @property
    def variances(self) -> Tensor:
        """[n, m]; 0 for what is constant up to rounding."""
        squares, means = self.mean_squares, self.sums / self.count
        variances = squares - means.square()
        return torch.where(variances <= 1e-12 * squares, 0.0, variances)

    def covariance(self) -> Tensor:
        """[n, n], summed over the copies, each about its own mean. Needs products."""
        assert self.products is not None
        cov = (self.products - self.sums @ self.sums.T / self.count) / self.count
        still = cov.diagonal() <= 1e-12 * self.products.diagonal() / self.count  # constant up to rounding
        cov[still] = 0
        cov[:, still] = 0
        return cov


@dataclass
class Readings:
    """What layers read on one set of inputs, kept until the network changes.

    products: are products of channels wanted, or only means and squares?
    """

    products: bool
    _network: tuple = ()
    _held: dict[str, Reading] = field(default_factory=dict)
    _narrow: dict[tuple[str, bytes], Reading] = field(default_factory=dict)
    _asked: int = 0

    def of(
        self, model: nn.Module, run: Callable[[Any], Any], batches: Callable[[], Iterable], readers: Sequence[Slot]
    ) -> list[Reading]:
        """One reading per slot, in the coordinates of its group; the same object where two read the very same.

        run: calls the network on one batch. The first pass measures all layers, as does every later one after one that
        was of use to several groups: where each group is scored on a network of its own, only its layers are measured.

        Raises ValueError, naming the layer, if what it reads is not finite or it is never reached.
        """
        network = _fingerprint(model)
        if network != self._network:
            everything = self._asked != 1
            self._network, self._asked = network, 0
            self._held, self._narrow = {}, {}
        else:
            everything = True
        self._asked += 1
        missing = [slot for slot in readers if not self._holds(slot)]
        if missing:
            self._measure(model, run, batches(), missing, everything)
        found: dict[tuple, Reading] = {}
        result = []
        for slot in readers:
            result.append(found.setdefault(self._source(slot), self._reading(slot)))
        return result

    def _is_narrow(self, slot: Slot) -> bool:
        return self.products and slot.size > WIDEST and slot.local.shape[1] > 1

    def _holds(self, slot: Slot) -> bool:
        return _key(slot) in self._narrow if self._is_narrow(slot) else slot.name in self._held

    def _source(self, slot: Slot) -> tuple:
        known = self._narrow.get(_key(slot)) or self._held.get(slot.name)
        return id(known) if known is not None else slot.name, _key(slot)[1]

    def _reading(self, slot: Slot) -> Reading:
        narrow = self._is_narrow(slot)
        reading = self._narrow.get(_key(slot)) if narrow else self._held.get(slot.name)
        if reading is None:
            raise ValueError(f"the inputs do not reach layer {slot.name!r}")
        if not reading.finite:
            raise ValueError(f"layer {slot.name!r} reads activations that are not finite")
        return reading if narrow else reading.at(slot.local)

    def _measure(
        self, model: nn.Module, run: Callable, batches: Iterable, missing: Sequence[Slot], everything: bool
    ) -> None:
        wanted: dict[str, _Layer] = {}
        for slot in missing:
            local = slot.local if self._is_narrow(slot) else None
            wanted[slot.name] = _Layer(slot.owner, slot.kind, slot.size, local)
        if everything:
            room = MOST_VALUES - sum(layer.width**2 for layer in wanted.values())
            for name, layer in _from(missing[0].name, _readers(model)):
                if name in wanted or name in self._held:
                    continue
                if self.products:
                    if layer.width > WIDEST or layer.width**2 > room:
                        continue
                    room -= layer.width**2
                wanted[name] = layer
        totals = _passed(model, run, batches, wanted, self.products)
        narrow = {slot.name: _key(slot) for slot in missing if self._is_narrow(slot)}
        for name, reading in totals.items():
            if name in narrow:
                self._narrow[narrow[name]] = reading
            else:
                self._held[name] = reading


@dataclass(frozen=True)
class _Layer:
    owner: Any
    kind: LayerKind
    size: int
    local: Tensor | None = None

    @property
    def width(self) -> int:
        return self.size if self.local is None else len(self.local)


def _key(slot: Slot) -> tuple[str, bytes]:
    return slot.name, slot.local.cpu().numpy().tobytes()


def _readers(model: nn.Module) -> list[tuple[str, _Layer]]:
    """Every linear layer and convolution, in the order of the network's attributes; depthwise ones read no group."""
    found = []
    for name, module in model.named_modules():
        kind = kind_of(module)
        if isinstance(kind, Filters) and not kind.is_depthwise:
            found.append((name, _Layer(module, kind, kind.inputs(module))))
    return found


def _from(name: str, layers: list[tuple[str, _Layer]]) -> list[tuple[str, _Layer]]:
    """The same, beginning at one of them."""
    start = next((i for i, (other, _) in enumerate(layers) if other == name), 0)
    return layers[start:] + layers[:start]


@torch.no_grad()
def _passed(
    model: nn.Module, run: Callable, batches: Iterable, layers: dict[str, _Layer], products: bool
) -> dict[str, Reading]:
    """One pass over the batches; a layer that is never reached is not in the result."""
    desk = _Desk(products)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, layer in layers.items():
            hook = partial(desk.read, name=name, layer=layer)
            stack.callback(layer.owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            run(batch)
            desk.settle()
    return desk.totals()


class _Desk:
    """Counts what layers read; layers that read one tensor one after the other, as projections do, are counted once."""

    def __init__(self, products: bool) -> None:
        self._products = products
        self._sums: dict[tuple[str, ...], Reading] = {}
        self._last: tuple | None = None
        self._names: list[str] = []

    def read(self, _module: nn.Module, args: tuple, kwargs: dict, *, name: str, layer: _Layer) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        axis = layer.kind.channel_axis
        if layer.local is not None or value.is_inference() or not self._is_last(value, axis):
            self.settle()
            self._now = Reading.of(by_channel(value, axis), layer.local, self._products)
            self._last = None if layer.local is not None or value.is_inference() else (value, value._version, axis)
        self._names.append(name)

    def _is_last(self, value: Tensor, axis: int) -> bool:
        """Is it the tensor that was read last, in the same way, and not written to since?"""
        if self._last is None:
            return False
        tensor, version, before = self._last
        return value is tensor and value._version == version and axis % value.dim() == before % value.dim()

    def settle(self) -> None:
        """What was read last goes to all that have read it."""
        if self._names:
            key = tuple(self._names)
            self._sums[key] = self._sums[key] + self._now if key in self._sums else self._now
        self._last, self._names = None, []

    def totals(self) -> dict[str, Reading]:
        found: dict[str, Reading] = {}
        for names, reading in self._sums.items():
            for name in names:
                found[name] = found[name] + reading if name in found else reading
        return found


def _fingerprint(model: nn.Module) -> tuple:
    """Changes whenever the network does: its modules, tensors, their versions, and their values (also through `.data`).

    Each tensor is multiplied by a fixed vector along its last axis and another one along the rest.
    """
    parts: list[tuple] = [(id(model),), *((name, type(module)) for name, module in model.named_modules())]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        version = None if tensor.is_inference() else tensor._version
        parts.append((name, tuple(tensor.shape), tensor.dtype, tensor.data_ptr(), version, _digest(tensor.detach())))
    return tuple(parts)


def _digest(values: Tensor) -> str:
    if not values.numel():
        return ""
    values = values if values.is_floating_point() else values.double()
    rows = values.reshape(-1, values.shape[-1]) if values.dim() else values.reshape(1, 1)
    sums = (rows @ _ramp(rows.shape[1], rows)).double()
    return repr(float(sums @ _ramp(len(sums), sums)))


def _ramp(n: int, like: Tensor) -> Tensor:
    """[n] different numbers of either sign, about 1 in size."""
    return torch.arange(n, dtype=torch.float64, device=like.device).cos().to(like.dtype)
