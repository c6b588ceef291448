"""What a forward pass does, seen call by call: which layer is called with what, who reads it, what lies between.

A layer is recognised by the weight that a call (`F.conv2d`, `F.linear`, ...) is given, not by its module: what counts
is what really arrives there. A layer and the batch-norm that belongs to it are one `Visit`. The visit is over when
something else reads the output; if that is an addition, what is added is part of what was seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from intrafusion.correct.calls import CHANNELWISE, RESHAPES, Call, as_windows, name_of, overwrites
from intrafusion.correct.mixtures import Mixtures
from intrafusion.groups.kinds.filters import PLAIN, Geometry
from intrafusion.running import leaves

_LAYER_CALLS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.embedding,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
_GROUPS_ARGUMENT = 6
"""Where every convolution of torch, transposed or not, has its number of groups."""
_BATCH_NORM = {F.batch_norm, torch.batch_norm}
_AS_IT_IS = Tensor.contiguous
_SHAPED = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}
"""Their second argument is the shape of their weight."""
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_METADATA = frozenset({
    "dim", "ndimension", "ndim", "dtype", "device", "layout", "is_floating_point", "is_complex", "is_cuda", "is_mps",
    "is_nested", "is_sparse", "is_quantized", "is_meta", "requires_grad", "grad_fn", "grad", "is_leaf", "get_device",
    "element_size", "is_xpu", "is_cpu", "names", "itemsize", "requires_grad_",
})  # fmt: skip
"""What may be asked of a tensor without reading it. (Its shape is not among them: a cut changes that.)"""


@dataclass(eq=False)
class Visit:
    """One call of a layer in one forward pass.

    inputs: what the call read. output: what the layer, with the batch-norm that belongs to it, gave. other: what is
    added to the output next, if anything. calls: those of the layer and its batch-norm, without what they read.
    """

    name: str
    inputs: Tensor
    output: Tensor
    calls: list[tuple[Callable, tuple, dict]]
    used: tuple[Tensor | None, ...]
    other: Tensor | None = None

    @property
    def geometry(self) -> Geometry:
        """How the call reads its input."""
        func, args, kwargs = self.calls[0]
        if func in (F.linear, F.embedding):
            return PLAIN
        axes = self.inputs.dim() - 2

        def of(name: str, at: int, default: int) -> Any:
            value = args[at] if at < len(args) else kwargs.get(name, default)
            return (value,) * axes if isinstance(value, int) else value if isinstance(value, str) else tuple(value)

        return Geometry(of("stride", 3, 1), of("padding", 4, 0), of("dilation", 5, 1))

    def again(self, layer: Any, norm: Any) -> Tensor:
        """What the same calls give with the tensors that the layer and its batch-norm have now."""
        (func, args, kwargs), *rest = self.calls
        value = func(*_with(args, kwargs, {0: self.inputs, 1: layer.weight}, {2: ("bias", layer)}), **kwargs)
        for func, args, kwargs in rest:
            stats = {0: value, 1: norm.running_mean, 2: norm.running_var}
            value = func(*_with(args, kwargs, stats, {3: ("weight", norm), 4: ("bias", norm)}), **kwargs)
        return value


def _with(args: tuple, kwargs: dict, positions: dict[int, Any], named: dict[int, tuple[str, Any]]) -> list:
    """The arguments of a recorded call with others in their places; those given by name are changed in `kwargs`."""
    new = list(args)
    for at, value in positions.items():
        new[at] = value
    for at, (name, owner) in named.items():
        value = getattr(owner, name, None)
        if at < len(new):
            new[at] = value
        elif value is not None or name in kwargs:
            kwargs[name] = value
    owner = next(iter(named.values()))[1]
    if isinstance(owner, nn.modules.conv._ConvNd):
        if len(new) > _GROUPS_ARGUMENT:
            new[_GROUPS_ARGUMENT] = owner.groups
        elif "groups" in kwargs:
            kwargs["groups"] = owner.groups
    return new


class Layers:
    """The layers of one network that are looked at, by the tensors that their calls are given.

    names: of the layers, each with the name of the batch-norm that reads it alone, or ''.
    """

    def __init__(self, network: nn.Module, names: dict[str, str]) -> None:
        self.network, self.names = network, names
        self._present: dict[tuple[nn.Module, str], Tensor] = {}
        self._renewed: dict[int, tuple[Tensor, Tensor]] = {}
        self._modules = {
            name: (network.get_submodule(name), network.get_submodule(norm) if norm else None)
            for name, norm in names.items()
        }
        self.refresh()

    def refresh(self) -> None:
        """To be called whenever a layer has got other tensors."""
        self._by_weight = {id(layer.weight): name for name, (layer, _) in self._modules.items()}
        present = {
            (module, name): tensor
            for module in self.network.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        }
        for place, old in self._present.items():
            if (new := present.get(place)) is not None and new is not old:
                self._renewed[id(old)] = old, new
        self._present = present

    def renew(self, func: Callable, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A call that was prepared before the last `refresh`, with the tensors of now."""
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if func in _SHAPED and isinstance(weight, Tensor) and (now := self._now(weight)) is not weight:
            args = (args[0], tuple(now.shape), *args[2:])
        return self._all_now(args), self._all_now(kwargs)

    def forget_renewed(self) -> None:
        """No call is left that was prepared before."""
        self._renewed.clear()

    def _now(self, value: Any) -> Any:
        old, new = self._renewed.get(id(value), (None, None))
        return new if old is value and new is not None else value

    def _all_now(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._all_now, value)) if type(value) in (tuple, list) else value
        if isinstance(value, dict):
            return {key: self._all_now(part) for key, part in value.items()}
        return self._now(value)

    def of(self, name: str) -> tuple[Any, Any]:
        """A layer and its batch-norm (or None)."""
        return self._modules[name]

    def called(self, func: Callable, args: tuple, kwargs: dict) -> str | None:
        """The name of the layer that a call belongs to."""
        if func not in _LAYER_CALLS:
            return None
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        return self._by_weight.get(id(weight)) if args else None

    def normalised(self, name: str, func: Callable, args: tuple) -> bool:
        """Is a call that of the layer's own batch-norm?"""
        norm = self._modules[name][1]
        return norm is not None and func in _BATCH_NORM and len(args) > 2 and args[1] is norm.running_mean

    def tensors(self, name: str) -> tuple[Tensor | None, ...]:
        """All that a call of the layer and its batch-norm reads beside its input."""
        layer, norm = self.of(name)
        own = (layer.weight, getattr(layer, "bias", None))
        return own if norm is None else (*own, norm.running_mean, norm.running_var, norm.weight, norm.bias)


@dataclass(eq=False)
class _Origin:
    """The call that made a tensor from another one, which is kept as it was then."""

    made: Callable[[], Tensor | None]
    before: Tensor
    call: Call


@dataclass(eq=False)
class Tape(TorchFunctionMode):
    """Watches one forward pass.

    layers: those that are looked at. execute: runs a call. called: told of every visit that begins. read: told of
    every visit that ends, before its output is read (or at the end of the pass); it may change the output in place.
    follow: remember for every tensor the calls that made it, for `trace_back`, `maker` and `mixtures`.
    """

    layers: Layers
    execute: Callable[[Callable, Sequence, dict], Any] = lambda func, args, kwargs: func(*args, **kwargs)
    called: Callable[[Visit], None] | None = None
    read: Callable[[Visit], None] | None = None
    follow: bool = False
    _open: dict[int, Visit] = field(default_factory=dict)
    _origins: dict[int, _Origin] = field(default_factory=dict)
    _makers: dict[int, tuple[Callable[[], Tensor | None], str]] = field(default_factory=dict)
    mixtures: Mixtures = field(default_factory=Mixtures)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [value for value in leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not tensors or name_of(func) in _METADATA:
            return func(*args, **kwargs)
        visit = self._open.get(id(args[0])) if args and self._open else None
        if visit is not None and len(visit.calls) == 1 and self.layers.normalised(visit.name, func, args):
            out = self.execute(func, args, kwargs)
            del self._open[id(args[0])]
            visit.calls.append((func, (None, *args[1:]), kwargs))
            visit.output = out
            self._open[id(out)] = visit
            if self.follow:
                self.mixtures.made(out, visit.name)
            return out
        if self._open:
            read = [self._open[id(value)] for value in tensors if id(value) in self._open]
            if read:
                self._end(read, func, args, kwargs)
                args, kwargs = self.layers.renew(func, args, kwargs)
            if overwrites(func, kwargs):
                self._spare(tensors[0])
        name = self.layers.called(func, args, kwargs)
        if name is not None:
            visit = Visit(name, args[0], args[0], [(func, (None, *args[1:]), kwargs)], self.layers.tensors(name))
            if self.called is not None:
                self.called(visit)
            visit.output = self.execute(func, args, kwargs)
            self._open[id(visit.output)] = visit
            if self.follow:
                self.mixtures.made(visit.output, name)
            return visit.output
        if not self.follow:
            return self.execute(func, args, kwargs)
        out = self._followed(func, args, kwargs)
        self.mixtures.called(func, (args, kwargs), out)
        return out

    def finish(self) -> None:
        """The pass is over: what nobody has read so far is read by its caller."""
        self._end(list(self._open.values()), None, (), {})

    def _end(self, visits: list[Visit], func: Any, args: Sequence, kwargs: dict) -> None:
        ending = sorted(dict.fromkeys(visits), key=list(self._open.values()).index)
        for number, visit in enumerate(ending):
            later = [one.output for one in ending[number + 1 :]]  # they may still change: they make up for this one
            if func in _ADDITIONS and len(args) == 2 and not kwargs:
                others = [value for value in args if value is not visit.output]
                fits = len(others) == 1 and isinstance(others[0], Tensor) and others[0].shape == visit.output.shape
                if fits and not any(others[0] is output for output in later):
                    visit.other = others[0]
            if self.read is not None:
                self.read(visit)
            self._open.pop(id(visit.output), None)
            if self.follow:
                self._makers[id(visit.output)] = weakref.ref(visit.output), visit.name

    def _spare(self, value: Tensor) -> None:
        """What is going to be overwritten is copied for the visits that have read it."""
        for visit in self._open.values():
            if visit.inputs is value:
                visit.inputs = self.execute(torch.clone, (value,), {})

    def _followed(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        before, earlier = first, None
        if first is not None and overwrites(func, kwargs):
            before, earlier = self.execute(torch.clone, (first,), {}), self._origins.get(id(first))
            maker = self.maker(first)
            if maker:
                self._makers[id(before)] = weakref.ref(before), maker
                del self._makers[id(first)]
        out = self.execute(func, args, kwargs)
        if not isinstance(out, Tensor) or (out is first and before is first):
            return out  # a dropout in eval mode, a tensor that is contiguous already
        self._origins.pop(id(out), None)
        if before is None or any(isinstance(value, Tensor) for value in leaves((args[1:], kwargs))):
            return out
        flattens = func in RESHAPES and out.dim() == 2 < before.dim() and out.shape[0] == before.shape[0]
        if flattens:  # however it is written, and whatever sizes are written there
            func, args, kwargs = torch.flatten, (first, 1), {}
        elif (windows := as_windows(func, before, out)) is not None:
            func, args, kwargs = (windows[0], (first, windows[1]), {}) if windows[1] > 1 else (_AS_IT_IS, (first,), {})
        if flattens or func in CHANNELWISE or name_of(func) == "boolean_dispatch":
            if "inplace" in kwargs:
                kwargs["inplace"] = False
            if earlier is not None:
                self._remember(before, earlier.before, earlier.call)
            self._remember(out, before, Call(func, args[1:], kwargs))
        return out

    def _remember(self, value: Tensor, before: Tensor, call: Call) -> None:
        """As long as a tensor lives, so does what it was made from."""
        key = id(value)
        gone = weakref.ref(value, lambda _, key=key: self._origins.pop(key, None))
        self._origins[key] = _Origin(gone, before, call)

    def forget(self) -> None:
        """Let go of every tensor: what watches their ends refers to the tape, in circles that nothing else breaks."""
        self.called = None
        for known in (self._open, self._origins, self._makers):
            known.clear()

    def trace_back(self, value: Tensor) -> tuple[Tensor, tuple[Call, ...]]:
        """The first tensor that `value` was made from by channelwise calls alone, and those calls in order."""
        chain: list[Call] = []
        while (origin := self._origins.get(id(value))) is not None and origin.made() is value:
            chain.insert(0, origin.call)
            value = origin.before
        return value, tuple(chain)

    def maker(self, value: Tensor) -> str:
        """The layer whose output a tensor is, '' if it is something else."""
        made, name = self._makers.get(id(value), (None, ""))
        return name if made is not None and made() is value else ""
