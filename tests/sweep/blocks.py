"""What networks are made of: every block takes a draft and a variable, and returns the variable that it made."""

from __future__ import annotations

from collections.abc import Callable

from tests.sweep.draft import Draft, Value, call, pick

# Called as `f(x)`, on any shape.
_FUNCTIONS = (
    ["F.relu"] * 6
    + ["F.leaky_relu", "F.gelu", "F.silu", "F.hardswish", "F.elu", "F.selu", "F.mish", "F.relu6"]
    + ["torch.tanh", "torch.sigmoid", "F.softplus", "F.hardtanh", "F.logsigmoid", "F.softsign"]
)

# Activations in arithmetic; {x} is the input.
_ARITHMETIC = (
    "F.relu({x}) ** 2",
    "torch.square(F.relu({x}))",
    "{x} * torch.sigmoid({x})",
    "{x} * torch.sigmoid(1.702 * {x})",
    "{x} * torch.tanh(F.softplus({x}))",
    "0.5 * {x} * (1 + torch.erf({x} / 2**0.5))",
    "{x} * (({x} + 3).clamp(0, 6) / 6)",
    "{x}.clamp(min=0)",
    "torch.where({x} > 0, {x}, 0.1 * {x})",
    "F.relu({x}) - 0.25",
    "2 * torch.sigmoid(2 * {x}) - 1",
    "{x}.abs()",
)


def activation(draft: Draft, x: Value) -> Value:
    """An activation: a function, a module, or arithmetic."""
    kind = pick(draft, [(6, "function"), (1.5, "arithmetic"), (1, "prelu"), (1, "module"), (0.7, "none")])
    if kind == "none":
        return x
    if kind == "function":
        return draft.like(x, f"{draft.random.choice(_FUNCTIONS)}({x.name})")
    if kind == "arithmetic":
        return draft.like(x, draft.random.choice(_ARITHMETIC).format(x=x.name))
    if kind == "module":
        made = draft.random.choice(["nn.ReLU(inplace=True)", "nn.GELU()", "nn.SiLU()", "nn.LeakyReLU(0.2)", "nn.ELU()"])
        return draft.like(x, f"{draft.layer('act', made)}({x.name})")
    own = not draft.tokens and draft.chance(0.7)  # nn.PReLU takes the second axis for the channels
    return draft.like(x, f"{draft.layer('prelu', call('nn.PReLU', x.channels if own else 1))}({x.name})")


def norm(draft: Draft, x: Value) -> Value:
    """A normalisation, or none."""
    if draft.dim == 0:
        kinds = [(2, "layer"), (1.5, "rms"), (2, "none")] + ([] if draft.tokens else [(3, "batch")])
    else:
        kinds = [(6, "batch"), (1, "group"), (0.7, "instance"), (0.5, "layer"), (2, "none")]
    kind, c = pick(draft, kinds), x.channels
    if kind == "none":
        return x
    if kind == "layer" and draft.dim:
        inner = ", ".join(map(str, [0, *draft.axes, 1]))
        outer = ", ".join(map(str, [0, draft.dim + 1, *range(1, draft.dim + 1)]))
        made = draft.layer("norm", call("nn.LayerNorm", c))
        return draft.like(x, f"{made}({x.name}.permute({inner})).permute({outer})")
    made = {
        "batch": call(f"nn.BatchNorm{max(1, draft.dim)}d", c, affine=False if draft.chance(0.1) else None),
        "group": call("nn.GroupNorm", draft.random.choice([1, 2]), c),
        "instance": call(f"nn.InstanceNorm{draft.dim}d", c, affine=True if draft.chance(0.6) else None),
        "layer": call("nn.LayerNorm", c),
        "rms": call("nn.RMSNorm", c),
    }[kind]
    name = "bn" if kind == "batch" else "norm"
    return draft.like(x, f"{draft.layer(name, made)}({x.name})")


def called(draft: Draft, layer: str, x: Value) -> str:
    """The call of a layer, sometimes by keyword."""
    return f"{layer}(input={x.name})" if draft.chance(0.07) else f"{layer}({x.name})"


def linear(draft: Draft, x: Value, width: int | None = None) -> Value:
    """A linear layer over the last axis."""
    width = width or draft.width()
    name = "EqualisedLinear" if draft.chance(0.05) else "nn.Linear"
    made = draft.layer("fc", call(name, x.channels, width, bias=False if draft.chance(0.2) else None))
    expression = f"{made}({x.name})" if name != "nn.Linear" else called(draft, made, x)
    return draft.value(expression, width)


def conv(draft: Draft, x: Value, width: int | None = None, keep_size: bool = False) -> Value:
    """A convolution with any kernel, stride, padding and dilation; `keep_size` where it is to be added."""
    width = width or draft.width()
    if draft.dim == 2 and draft.chance(0.08):
        return _own_conv(draft, x, width, keep_size)
    kernel = draft.random.choice([1, 2, 3, 3, 3, 4, 5] if x.size >= 6 else [1, 2, 3])
    dilation = 2 if kernel == 3 and x.size >= 6 and draft.chance(0.1) else None
    reach = (kernel - 1) * (dilation or 1)
    mode, stride = None, None
    if keep_size or draft.chance(0.3):
        padding: object = reach // 2 if reach % 2 == 0 and draft.chance(0.7) else "same"
        size = x.size
        if reach and reach // 2 + 1 < x.size and draft.chance(0.2):
            mode = draft.random.choice(["reflect", "replicate", "circular"])
    else:
        padding = draft.random.randint(0, reach // 2 + 1 if reach else 0)
        stride = 2 if x.size >= 6 and draft.chance(0.3) else None
        size = (x.size + 2 * padding - reach - 1) // (stride or 1) + 1
        if size < 2:
            return conv(draft, x, width, keep_size=True)
    if padding == 0:
        padding = None
    keywords = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    keywords |= {"bias": False if draft.chance(0.3) else None, "groups": _groups(draft, x.channels, width)}
    made = draft.layer("conv", call(f"nn.Conv{draft.dim}d", x.channels, width, kernel, **keywords))
    return draft.value(called(draft, made, x), width, size)


def _groups(draft: Draft, channels: int, width: int) -> int | None:
    return 2 if channels % 4 == 0 and width % 4 == 0 and draft.chance(0.08) else None


def _own_conv(draft: Draft, x: Value, width: int, keep_size: bool) -> Value:
    """A convolution whose own forward pads, or changes its weight."""
    if draft.chance(0.5):
        made = draft.layer("conv", call("StandardisedConv2d", x.channels, width, 3, padding=1))
        return draft.value(f"{made}({x.name})", width, x.size)
    stride = None if keep_size or x.size < 4 else 2
    made = draft.layer("conv", call("PaddedConv2d", x.channels, width, draft.random.choice([2, 3]), stride=stride))
    return draft.value(f"{made}({x.name})", width, x.size if stride is None else -(-x.size // 2))


def transposed(draft: Draft, x: Value) -> Value:
    """A transposed convolution, which may enlarge."""
    kernel, stride = draft.random.choice([(2, 2), (3, 1), (4, 2), (3, 2)] if x.size <= 4 else [(3, 1), (2, 1)])
    padding = draft.random.choice([0, 1]) if kernel > 2 else 0
    extra = 1 if stride == 2 and draft.chance(0.3) else None
    size, width = (x.size - 1) * stride - 2 * padding + kernel + (extra or 0), draft.width()
    if size < 2:
        return conv(draft, x, width)
    keywords = {
        "stride": stride,
        "padding": padding,
        "output_padding": extra,
        "groups": _groups(draft, x.channels, width),
    }
    made = draft.layer("up", call(f"nn.ConvTranspose{draft.dim}d", x.channels, width, kernel, **keywords))
    return draft.value(called(draft, made, x), width, size)


def depthwise(draft: Draft, x: Value) -> Value:
    """Every channel convolved for itself."""
    kernel = draft.random.choice([3, 3, 2, 5 if x.size >= 6 else 3])
    keywords = {"padding": "same", "groups": x.channels, "bias": False if draft.chance(0.5) else None}
    made = draft.layer("dw", call(f"nn.Conv{draft.dim}d", x.channels, x.channels, kernel, **keywords))
    return draft.like(x, f"{made}({x.name})")


def layer(draft: Draft, x: Value, width: int | None = None, keep_size: bool = False) -> Value:
    """What makes new channels: a convolution, or a linear layer."""
    return conv(draft, x, width, keep_size) if draft.dim else linear(draft, x, width)


def unit(draft: Draft, x: Value, width: int | None = None, keep_size: bool = False) -> Value:
    """Layer, norm and activation, in the usual order."""
    return activation(draft, norm(draft, layer(draft, x, width, keep_size)))


def plain(draft: Draft, x: Value) -> Value:
    """One unit."""
    return unit(draft, x)


def preactivated(draft: Draft, x: Value) -> Value:
    """Norm and activation before the layer."""
    return layer(draft, activation(draft, norm(draft, x)))


def enlarged(draft: Draft, x: Value) -> Value:
    """A transposed convolution, norm and activation."""
    return activation(draft, norm(draft, transposed(draft, x)))


def separable(draft: Draft, x: Value) -> Value:
    """Depthwise, norm, activation, then 1x1."""
    return unit(draft, activation(draft, norm(draft, depthwise(draft, x))))


def branch(draft: Draft, x: Value) -> Value:
    """Something of the same shape: one or two layers."""
    y = unit(draft, x, keep_size=True) if draft.chance(0.7) else x
    return norm(draft, layer(draft, y, x.channels, keep_size=True))


def residual(draft: Draft, x: Value) -> Value:
    """x + f(x), x - f(x), alpha= of an addition, in place, a layer scale."""
    y = branch(draft, x)
    ways = ["{x} + {y}"] * 5 + ["{x} - {y}", "torch.add({x}, {y}, alpha=0.5)", "{x} + 0.5 * {y}", "torch.sub({y}, {x})"]
    if draft.chance(0.08):
        shape = [1, x.channels, *[1] * draft.dim] if draft.dim else [x.channels]
        scale = draft.layer("scale", f"nn.Parameter(0.5 + torch.rand({', '.join(map(str, shape))}))")
        ways = [f"{{x}} + {scale} * {{y}}"]
    z = draft.like(x, draft.random.choice(ways).format(x=x.name, y=y.name))
    return activation(draft, z) if draft.chance(0.6) else z


def projected(draft: Draft, x: Value) -> Value:
    """g(x) + f(x): a residual block that changes the width."""
    width = draft.width()
    a, b = norm(draft, layer(draft, x, width, keep_size=True)), unit(draft, x, width, keep_size=True)
    return activation(draft, draft.like(a, f"{a.name} + {b.name}"))


def concat(draft: Draft, x: Value) -> Value:
    """Branches side by side, x itself among them at times, a norm behind them at times."""
    parts = [unit(draft, x, keep_size=True) for _ in range(draft.random.choice([1, 2, 2, 3]))]
    if len(parts) == 1 or draft.chance(0.3):
        parts.insert(0, x)
    axis = 1 if draft.dim or not draft.tokens else 2
    names = ", ".join(part.name for part in parts)
    y = draft.value(f"torch.cat([{names}], {axis})", sum(part.channels for part in parts), x.size)
    return activation(draft, norm(draft, y)) if draft.chance(0.5) else y


def gate(draft: Draft, x: Value) -> Value:
    """The product of two branches."""
    width = draft.width()
    a, b = layer(draft, x, width, keep_size=True), layer(draft, x, width, keep_size=True)
    curve = draft.random.choice(["torch.sigmoid({})", "F.silu({})", "F.gelu({})", "torch.tanh({})", "F.relu({})", "{}"])
    if draft.chance(0.4):
        a = norm(draft, a)
    return draft.like(a, f"{a.name} * {curve.format(b.name)}")


def squeeze(draft: Draft, x: Value) -> Value:
    """Squeeze and excitation."""
    inner = draft.random.choice([4, 4, 8])
    if draft.dim == 0:
        down, up = call("nn.Linear", x.channels, inner), call("nn.Linear", inner, x.channels)
        pooled = x.name if not draft.tokens else f"{x.name}.mean(1, keepdim=True)"
    else:
        kind = f"nn.Conv{draft.dim}d"
        down, up = call(kind, x.channels, inner, 1), call(kind, inner, x.channels, 1)
        pooled = f"{x.name}.mean({draft.axes}, keepdim=True)"
    down, up = draft.layer("down", down), draft.layer("excite", up)
    y = draft.value(f"F.relu({down}({pooled}))", inner)
    curve = draft.random.choice(["torch.sigmoid", "F.hardsigmoid"])
    return draft.like(x, f"{x.name} * {curve}({up}({y.name}))")


def repeated(draft: Draft, x: Value) -> Value:
    """One layer called twice, one call after the other, with one norm or two."""
    made = _square_layer(draft, x)
    y = activation(draft, norm(draft, draft.like(x, f"{made}({x.name})")))
    y = draft.like(x, f"{made}({y.name})")
    y = norm(draft, y)
    return draft.like(x, f"{x.name} + {y.name}") if draft.chance(0.3) else activation(draft, y)


def siamese(draft: Draft, x: Value) -> Value:
    """One layer called on two inputs, whose outputs meet in a sum, a difference or a concat."""
    width = draft.width()
    kind = f"nn.Conv{draft.dim}d" if draft.dim else "nn.Linear"
    arguments = (x.channels, width, 3) if draft.dim else (x.channels, width)
    made = draft.layer("twin", call(kind, *arguments, padding=1 if draft.dim else None))
    other = f"{x.name}.flip(-1)" if draft.dim else f"torch.tanh({x.name})"
    a, b = draft.value(f"{made}({x.name})", width, x.size), draft.value(f"{made}({other})", width, x.size)
    if draft.chance(0.5):
        a, b = activation(draft, a), activation(draft, b)
    axis = 1 if draft.dim or not draft.tokens else 2
    ways = ["{a} + {b}", "{a} - {b}", "({a} - {b}).abs()", "torch.maximum({a}, {b})", "cat"]
    way = draft.random.choice(ways)
    if way == "cat":
        return draft.value(f"torch.cat([{a.name}, {b.name}], {axis})", 2 * width, x.size)
    return draft.like(a, way.format(a=a.name, b=b.name))


def _square_layer(draft: Draft, x: Value) -> str:
    if draft.dim:
        return draft.layer("shared", call(f"nn.Conv{draft.dim}d", x.channels, x.channels, 3, padding=1))
    return draft.layer("shared", call("nn.Linear", x.channels, x.channels))


def pool(draft: Draft, x: Value) -> Value:
    """Max or average pooling, or sampling up."""
    if x.size < 4:
        return draft.value(f"F.interpolate({x.name}, scale_factor=2)", x.channels, 2 * x.size)
    name = draft.random.choice([f"F.max_pool{draft.dim}d", f"F.avg_pool{draft.dim}d"])
    return draft.value(f"{name}({x.name}, 2)", x.channels, x.size // 2)


Block = Callable[[Draft, Value], Value]

SPATIAL: dict[Block, float] = {
    plain: 5, preactivated: 1, enlarged: 1.2, separable: 1.2, residual: 3, projected: 1, concat: 2, gate: 1,
    squeeze: 1, repeated: 1, siamese: 1, pool: 1,
}  # fmt: skip
FLAT: dict[Block, float] = {
    plain: 5, preactivated: 1, residual: 3, projected: 1, concat: 1.5, gate: 2, squeeze: 0.7, repeated: 1, siamese: 1,
}  # fmt: skip
