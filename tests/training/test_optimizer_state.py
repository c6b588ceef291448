"""An optimizer goes on after a pruning step: its state travels by the maps of the weights."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion import Fusion, FusionError, IntraFusionPruner, transfer_optimizer_state
from tests.nets import PICO, Case, randomise_
from tests.surgery.test_invariance import DUPLICABLE, build, duplicate_channels_, keep_even_channels

DUPLICATES = Fusion(merge="barycentre", columns=False, bias=True)
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
}


def train_(model: nn.Module, optimizer, case: Case, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, *case.shape, generator=generator)).square().mean().backward()
        optimizer.step()


def held(optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def tensors(optimizer, parameter) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}


def cut_by_torch_pruning(case: Case, values: dict[str, Tensor], history: list) -> dict[str, Tensor]:
    """What torch-pruning leaves of `values` (by parameter name) if they are the weights."""
    model = case.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        graph = tp.DependencyGraph().build_dependency(model, (case.example(),))
    graph.load_pruning_history(history)
    return dict(model.named_parameters())


@pytest.mark.parametrize("make", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_what_is_only_cut_keeps_the_state_of_what_stays_bit_for_bit(case, make):
    model, pruner = build(case, pruning_ratio=0.5, fusion="discard")
    optimizer = OPTIMIZERS[make](model.parameters())
    train_(model, optimizer, case)
    before = {name: tensors(optimizer, p) for name, p in model.named_parameters()}
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    for key in before["fc.bias" if "fc.bias" in before else next(iter(before))]:
        want = cut_by_torch_pruning(
            case, {name: state[key] for name, state in before.items()}, pruner.pruning_history()
        )
        for name, parameter in model.named_parameters():
            assert torch.equal(optimizer.state[parameter][key], want[name]), (name, key)
    assert all(float(optimizer.state[p]["step"]) == 3 for p in held(optimizer) if "step" in optimizer.state[p])


@pytest.mark.parametrize("case", DUPLICABLE, ids=lambda case: case.name)
def test_of_merged_duplicates_momentum_is_the_gradient_of_the_merged_network(case):
    """One step of learning rate 0 puts the gradient into the momentum; autograd says what it has to become."""
    model, pruner = build(case, pruning_ratio=0.5, fusion=DUPLICATES)
    duplicate_channels_(pruner)
    pruner.importance = keep_even_channels
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    adam = torch.optim.Adam(model.parameters(), lr=0.0)
    model(case.example()).square().sum().backward()
    sgd.step()
    adam.step()
    pruner.step()
    assert pruner.report.fused
    for optimizer in (sgd, adam):
        transfer_optimizer_state(optimizer, pruner)
    model.zero_grad()
    model(case.example()).square().sum().backward()
    for name, parameter in model.named_parameters():
        grad, tolerance = parameter.grad, 2e-3 * float(parameter.grad.abs().max() + 1e-2)
        assert float((sgd.state[parameter]["momentum_buffer"] - grad).abs().max()) < tolerance, name
        assert float((adam.state[parameter]["exp_avg"] / 0.1 - grad).abs().max()) < tolerance, name
        # the second moment is an upper bound
        root = (adam.state[parameter]["exp_avg_sq"] / 0.001).sqrt()
        assert float((grad.abs() - root).max()) < tolerance, name


class Symmetric(nn.Module):
    """Every channel of the first layer is there twice, with equal rows and equal readers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        with torch.no_grad():
            for tensor in (self.conv.weight, self.conv.bias, self.bn.weight, self.bn.bias, self.bn.running_mean):
                tensor.copy_(torch.randn(tensor.shape[0] // 2, *tensor.shape[1:]).repeat_interleave(2, dim=0))
            self.bn.running_var.copy_((torch.rand(4) + 0.5).repeat_interleave(2))
            self.fc.weight.copy_(torch.randn(4, 4).repeat_interleave(2, dim=1))

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_second_moments_of_symmetric_duplicates_are_exact():
    case = Case("symmetric", Symmetric, (3, 6, 6))
    torch.manual_seed(0)
    model = Symmetric().eval()
    pruner = IntraFusionPruner(model, case.example(), keep_even_channels, fusion=DUPLICATES, ignored_layers=[model.fc])
    adam = torch.optim.Adam(model.parameters(), lr=0.0, amsgrad=True)
    model(case.example()).square().sum().backward()
    adam.step()
    pruner.step()
    transfer_optimizer_state(adam, pruner)
    model.zero_grad()
    model(case.example()).square().sum().backward()
    for name, parameter in model.named_parameters():
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            torch.testing.assert_close(
                adam.state[parameter][key], 0.001 * parameter.grad.square(), rtol=1e-3, atol=1e-6
            )
        assert parameter.shape[0] == 4 or name == "fc.weight"


def test_a_warm_adam_takes_the_step_of_the_network_before():
    """Symmetric duplicates: fuse, then step, is step, then fuse."""
    case = Case("symmetric", Symmetric, (3, 6, 6))
    outputs = []
    for fuse_first in (True, False):
        torch.manual_seed(0)
        model = Symmetric().eval()
        pruner = IntraFusionPruner(
            model, case.example(), keep_even_channels, fusion=DUPLICATES, ignored_layers=[model.fc]
        )
        readers = {"params": [model.fc.weight], "lr": 0.0}  # a reader's gradient is as large, the merged one twice that
        rest = [p for p in model.parameters() if p is not model.fc.weight]
        adam = torch.optim.Adam([{"params": rest}, readers], lr=1e-3, eps=1e-12)
        train_(model, adam, case, steps=3)
        if fuse_first:
            pruner.step()
            transfer_optimizer_state(adam, pruner)
        train_(model, adam, case, steps=1)
        if not fuse_first:
            pruner.step()
        outputs.append(model(case.example()))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def test_gradients_follow_a_refit_too():
    """The refit splits folded layers anew, and may flip signs; autograd sees the result."""
    case = PICO[0]
    batch = torch.randn(256, *case.shape)
    model, pruner = build(
        case, pruning_ratio=0.5, fusion=replace(DUPLICATES, correct="calibrated"), calibration=[batch]
    )
    duplicate_channels_(pruner)
    for bn in (model.bn1, model.bn2, model.bn3):
        bn.momentum = 1.0  # the statistics are those of the batch
    model.train()(batch)
    model.eval()
    pruner.importance = keep_even_channels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    target = torch.randn(256, 4)
    F.mse_loss(model(batch), target).backward()
    optimizer.step()
    assert (model.bn3.weight < 0).any()
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    model.zero_grad()
    F.mse_loss(model(batch), target).backward()
    assert (model.bn3.weight > 0).all()
    for parameter in model.parameters():
        carried = optimizer.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(carried, parameter.grad, rtol=0.05, atol=0.02 * float(parameter.grad.abs().max()))


@pytest.mark.parametrize("fusion", ["data-free", "barycentre", "paper"])
@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_training_goes_on_whatever_the_network(case, fusion):
    model, pruner = build(case, pruning_ratio=0.5, fusion=fusion)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what this fusion can only cut
        pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert {id(p) for p in held(optimizer)} == {id(p) for p in model.parameters()}
    for parameter in held(optimizer):
        for value in tensors(optimizer, parameter).values():
            assert value.shape == parameter.shape
            assert torch.isfinite(value).all()
        assert all((v >= 0).all() for k, v in tensors(optimizer, parameter).items() if k.endswith("_sq"))
    train_(model, optimizer, case, steps=1)
    warm = [p for p in held(optimizer) if float(optimizer.state[p]["step"]) == 4]
    assert len(warm) == len(held(optimizer)) or fusion == "data-free"
    assert len(warm) >= len(held(optimizer)) - 2  # the biases that a refit added


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_every_optimizer_goes_on(make):
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, fusion="barycentre")
    optimizer = OPTIMIZERS[make](model.parameters())
    train_(model, optimizer, case)
    shapes = {id(p): {k: type(v) for k, v in optimizer.state[p].items()} for p in held(optimizer)}
    kinds = list(shapes.values())
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [{k: type(v) for k, v in optimizer.state[p].items()} for p in held(optimizer)] == kinds
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    train_(model, optimizer, case, steps=1)
    assert all(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    fresh = OPTIMIZERS[make](model.parameters())
    fresh.load_state_dict(optimizer.state_dict())


def test_a_step_that_removes_nothing_leaves_the_state_bit_for_bit():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.0)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    before, states = copy.deepcopy(optimizer.state_dict()), [optimizer.state[p] for p in held(optimizer)]
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert all(optimizer.state[p] is state for p, state in zip(held(optimizer), states, strict=True))
    after = optimizer.state_dict()
    assert str(before) == str(after)


def test_groups_names_frozen_parameters_and_schedulers_stay():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    model.conv2.weight.requires_grad_(False)
    named = dict(model.named_parameters())
    decay = [(n, p) for n, p in named.items() if p.dim() > 1]
    rest = [(n, p) for n, p in named.items() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 1e-2}], lr=1e-3
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    train_(model, optimizer, case, steps=1)
    scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    named = dict(model.named_parameters())
    assert [p for g in optimizer.param_groups for p in g["params"]] == [
        *(p for p in named.values() if p.dim() > 1),
        *(p for p in named.values() if p.dim() == 1),
    ]
    for group in optimizer.param_groups:
        assert [named[name] is p for name, p in zip(group["param_names"], group["params"], strict=True)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert not model.conv2.weight.requires_grad
    assert model.conv2.weight not in optimizer.state
    train_(model, optimizer, case, steps=1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] < rates[0]


class Biasless(nn.Module):
    """A layer without a bias and without a batch-norm: a refit gives it a bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


BIASLESS = Case("biasless", Biasless, (3, 8, 8))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_bias_that_a_refit_added_joins_the_group_of_the_biases(steps):
    model, pruner = build(BIASLESS, pruning_ratio=0.5, iterative_steps=steps)
    optimizer = torch.optim.SGD(
        [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": [model.fc.bias]}], lr=0.1, momentum=0.9
    )
    train_(model, optimizer, BIASLESS)
    for _ in range(steps):
        pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert model.b.bias is not None
    assert any(p is model.b.bias for p in optimizer.param_groups[1]["params"])
    assert {id(p) for p in held(optimizer)} == {id(p) for p in model.parameters()}
    before = model.b.bias.detach().clone()
    train_(model, optimizer, BIASLESS, steps=1)
    assert not torch.equal(before, model.b.bias)


def test_a_layer_that_is_not_trained_gets_no_trained_bias():
    model, pruner = build(BIASLESS, pruning_ratio=0.5)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1, momentum=0.9)
    train_(model, optimizer, BIASLESS)
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.fc.parameters()]


class Attention(nn.Module):
    """Multi-head attention, whose packed weights torch-pruning cuts along two axes."""

    def __init__(self):
        super().__init__()
        self.embed, self.attend = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.embed(x)
        return self.head(self.attend(y, y, y, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("fusion", ["discard", "barycentre"])
def test_layers_that_are_only_cut_are_followed_by_their_own_cut(fusion):
    case = Case("attention", Attention, (5, 6), "head")
    model, pruner = build(case, pruning_ratio=0.5, fusion=fusion, num_heads={})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train_(model, optimizer, case)
    before = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert model.attend.in_proj_weight.shape == (12, 4)
    want = cut_by_torch_pruning(case, before, pruner.pruning_history())
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], want[name]), name


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc.weight = self.b.weight

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x)))))


def test_tied_weights_that_torch_pruning_unties_both_go_on():
    case = Case("tied", Tied, (6,))
    model, pruner = build(case, pruning_ratio=0.5, fusion="discard")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train_(model, optimizer, case)
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert {id(p) for p in held(optimizer)} == {id(p) for p in model.parameters()}
    assert len(held(optimizer)) == len(list(model.parameters()))
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in held(optimizer))
    train_(model, optimizer, case, steps=1)


def test_half_precision_states_keep_their_dtype():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, fusion="barycentre")
    model.bfloat16()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[model.conv1.weight]["exp_avg"] = torch.ones(8, 3, 3, 3)  # as master-weight optimizers have them
    pruner._example = tuple(x.bfloat16() for x in pruner._example)
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert optimizer.state[model.conv1.weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model.fc1.weight]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[model.conv1.weight]["exp_avg"].shape == model.conv1.weight.shape


@pytest.mark.parametrize("each", [True, False], ids=["after each step", "after the last"])
def test_several_steps_compose(each):
    case = PICO[1]
    model, pruner = build(case, pruning_ratio=0.5, iterative_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train_(model, optimizer, case)
    for _ in range(3):
        pruner.step()
        if each:
            transfer_optimizer_state(optimizer, pruner)
    transfer_optimizer_state(optimizer, pruner)
    got = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    assert all(got[name].shape == p.shape for name, p in model.named_parameters())
    assert got["stem.weight"].norm() > 0


def test_steps_between_or_after_transfers_give_the_same_state():
    states = []
    for each in (True, False):
        case = PICO[0]
        model, pruner = build(case, pruning_ratio=0.5, iterative_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        train_(model, optimizer, case)
        for _ in range(2):
            pruner.step()
            if each:
                transfer_optimizer_state(optimizer, pruner)
        transfer_optimizer_state(optimizer, pruner)
        states.append([optimizer.state[p]["momentum_buffer"] for p in held(optimizer)])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


def test_an_optimizer_made_between_two_steps_and_pruning_by_hand():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, iterative_steps=2)
    pruner.step()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    for group in pruner.step(interactive=True):
        group.prune()
    pruner.manual_prune_width(model.fc1, tp.prune_linear_out_channels, [0])
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    train_(model, optimizer, case, steps=1)


def test_after_a_failed_step_the_optimizer_goes_on_as_it_was(monkeypatch):
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    states = [optimizer.state[p] for p in held(optimizer)]
    with monkeypatch.context() as patch:
        patch.setattr("intrafusion.surgery.sequential.Sequential.finish", lambda self: 1 / 0)
        with pytest.raises(FusionError):
            pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    assert all(optimizer.state[p] is state for p, state in zip(held(optimizer), states, strict=True))
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    train_(model, optimizer, case, steps=1)


def test_the_parameters_between_two_steps_are_not_kept_alive():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, iterative_steps=3, fusion="barycentre")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train_(model, optimizer, case)
    pruner.step()
    between = [weakref.ref(p) for p in model.parameters()]
    pruner.step()
    gc.collect()
    alive = {id(p) for p in model.parameters()}
    assert all(ref() is None or id(ref()) in alive for ref in between)
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    assert all(optimizer.state[p]["momentum_buffer"].norm() > 0 for p in held(optimizer))


def same_after(optimizer, act) -> bool:
    before = [(id(p), id(optimizer.state[p])) for p in held(optimizer)]
    act()
    return [(id(p), id(optimizer.state[p])) for p in held(optimizer)] == before


def test_foreign_parameters_are_named_and_nothing_changes():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    foreign = nn.Linear(3, 2)
    optimizer = OPTIMIZERS["adam"]([{"params": model.parameters()}, {"params": foreign.parameters()}])
    train_(model, optimizer, case)
    pruner.step()

    def act():
        with pytest.raises(ValueError, match=r"parameter 0 of the optimizer's group 1 \(shape \(2, 3\)\) is not of"):
            transfer_optimizer_state(optimizer, pruner)

    assert same_after(optimizer, act)
    transfer_optimizer_state(optimizer, pruner, keep=foreign.parameters())
    assert optimizer.param_groups[1]["params"][0] is foreign.weight


def test_states_of_an_unknown_kind_are_named_and_can_be_explained():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    for parameter in held(optimizer):
        optimizer.state[parameter]["slow"] = torch.ones_like(parameter)
    pruner.step()

    def act():
        with pytest.raises(ValueError, match=r"state 'slow' \(8, 3, 3, 3\) of 'conv1.weight'"):
            transfer_optimizer_state(optimizer, pruner)

    assert same_after(optimizer, act)
    with pytest.raises(ValueError, match="choose one of"):
        transfer_optimizer_state(optimizer, pruner, kinds={"slow": "momentum"})
    transfer_optimizer_state(optimizer, pruner, kinds={"slow": "drop"})
    assert "slow" not in optimizer.state[model.conv1.weight]


def test_what_is_no_optimizer_or_keeps_a_flat_history_is_refused():
    model, pruner = build(PICO[0])
    with pytest.raises(ValueError, match="is a list"):
        transfer_optimizer_state([], pruner)
    with pytest.raises(ValueError, match="LBFGS"):
        transfer_optimizer_state(torch.optim.LBFGS(model.parameters()), pruner)


def test_wrappers_with_an_optimizer_inside_are_opened():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner.step()
    transfer_optimizer_state(SimpleNamespace(optimizer=optimizer), pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]


def test_a_layer_whose_cut_cannot_be_followed_is_named():
    class Odd(nn.Linear):
        pass

    class OddPruner(tp.pruner.function.LinearPruner):
        def prune_out_channels(self, layer, idxs):
            if float(layer.weight.sum()) == float(torch.arange(8.0)[:, None].expand(8, 8).sum()):
                raise RuntimeError("not with these numbers")
            return super().prune_out_channels(layer, idxs)

        prune_in_channels = tp.pruner.function.LinearPruner.prune_in_channels

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.odd, self.fc = nn.Linear(6, 8), Odd(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(F.relu(self.odd(F.relu(self.a(x)))))

    case = Case("odd", Net, (6,))
    model, pruner = build(case, fusion="discard", customized_pruners={Odd: OddPruner()}, root_module_types=[Odd])
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train_(model, optimizer, case)
    pruner.step()
    assert model.odd.out_features == 4
    with pytest.raises(ValueError, match=r"state of 'odd.weight' cannot be carried over: .*Odd"):
        transfer_optimizer_state(optimizer, pruner)


def test_randomised_networks_have_both_signs():
    assert (randomise_(PICO[0].build()).bn1.weight < 0).any()
