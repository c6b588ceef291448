"""A pruned network as an ONNX file, and under torch.export and torch.compile: the same outputs."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2

import intrafusion
from intrafusion import ExportError
from intrafusion.lab.models import build_model
from intrafusion.onnx.fold import fold_batchnorms_
from tests.checkpoint.networks import CASES, pruned, pruner_of, randomise, state
from tests.checkpoint.networks import same as equal


def resnet20() -> tuple[nn.Module, Tensor]:
    model, example = randomise(build_model("cifar_resnet20", 10)), torch.randn(2, 3, 32, 32)
    stream = [layer for name, layer in model.named_modules() if name.endswith("conv2") or name == "conv1"]
    pruner_of(model, example, [*stream, model.linear])
    return model, example


def mobilenet() -> tuple[nn.Module, Tensor]:
    settings = [[1, 8, 1, 1], [4, 8, 2, 2], [4, 16, 1, 2]]
    model, example = MobileNetV2(10, 0.5, settings), torch.randn(2, 3, 16, 16)
    model(torch.randn(32, 3, 16, 16))  # a few batch statistics, or nothing of the image reaches the output
    pruner_of(model.eval(), example, [model.classifier[1]])
    return model, example


def pico(name: str) -> tuple[nn.Module, Tensor]:
    return pruned(name), CASES[name].example()


def run(path, *inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def operators(path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


NETWORKS = {
    "resnet20": resnet20,
    "mobilenet": mobilenet,
    "plain": lambda: pico("plain"),
    "grouped": lambda: pico("grouped"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_gives_the_networks_outputs_without_batch_norms_at_any_batch_size(name, tmp_path):
    model, example = NETWORKS[name]()
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    before, path = state(model), tmp_path / "model.onnx"
    exported = intrafusion.export(model, path, example[:1])
    assert equal(state(model), before)
    assert (exported.path, exported.folded) == (path, norms)
    assert 0 <= exported.difference < 1e-5
    assert "BatchNormalization" not in operators(path)
    assert os.listdir(tmp_path) == [path.name]
    for size in (1, 3, 7):
        x = torch.randn(size, *example.shape[1:])
        with torch.no_grad():
            expected = model(x)
        assert size == 1 or not torch.allclose(expected[0], expected[1], rtol=1e-3)  # or any file would do
        torch.testing.assert_close(run(path, x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class TwoInputs(nn.Module):
    """A grouped transposed convolution with batch-norm, a batch-norm behind nothing, and one that training uses."""

    def __init__(self):
        super().__init__()
        self.up, self.bn = nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)
        self.shared, self.after, self.alone = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.BatchNorm1d(4)
        self.sequence, self.tokens = nn.Linear(6, 5), nn.BatchNorm1d(3)

    def forward(self, x, scale):
        y = torch.relu(self.bn(self.up(self.alone(x)))).mean(-1)
        y = self.after(self.shared(torch.relu(self.after(self.shared(y)))))
        tokens = self.tokens(self.sequence(torch.stack([y, y * scale, y - scale], 1)))
        return {"first": tokens.sum(1), "second": y}


def test_folding_a_graph_keeps_its_outputs_and_leaves_what_it_cannot_fold():
    torch.manual_seed(0)
    model, inputs = randomise(TwoInputs()), (torch.randn(5, 4, 6), torch.rand(5, 1))
    before = state(model)
    graph = torch.export.export(model, inputs).module()
    assert fold_batchnorms_(graph) == 3  # `after` twice; `alone` has no layer before it, `tokens` another axis
    left = [node for node in graph.graph.nodes if "batch_norm" in str(node.target)]
    assert len(left) == 2
    found, expected = graph(*inputs), model(*inputs)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    assert equal(state(model), before)


def test_a_batch_norm_in_training_mode_stays():
    model, x = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).train(), torch.randn(2, 3, 4, 4)
    assert fold_batchnorms_(torch.export.export(model, (x,)).module()) == 0


@pytest.mark.slow
def test_dictionaries_of_inputs_and_a_fixed_batch(tmp_path):
    model, path = randomise(TwoInputs()), tmp_path / "new" / "model.onnx"
    inputs = {"scale": torch.rand(5, 1), "x": torch.randn(5, 4, 6)}
    exported = intrafusion.export(torch.compile(model), path, inputs, dynamic_batch=False)
    assert exported.folded == 3
    by_name = {"scale": inputs["scale"], "x": inputs["x"]}
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [slot.shape for slot in session.get_inputs()] == [[5, 1], [5, 4, 6]]
    first = session.run(None, {name: x.numpy() for name, x in by_name.items()})[0]
    torch.testing.assert_close(torch.from_numpy(first), model(**inputs)["first"], rtol=1e-4, atol=1e-4)


class Variadic(nn.Module):
    """Any number of arguments."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, first, *others):
        return sum(map(self.layer, others), self.layer(first))


@pytest.mark.slow
def test_arguments_without_names_of_their_own_may_have_any_batch(tmp_path):
    model, path = Variadic().eval(), tmp_path / "model.onnx"
    intrafusion.export(model, path, tuple(torch.randn(3, 1, 4)))
    given = torch.randn(3, 5, 4)
    torch.testing.assert_close(run(path, *given), model(*given), rtol=1e-4, atol=1e-5)


class OneLength(nn.Module):
    """Adds something that has the length of a batch."""

    def __init__(self, length):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("offset", torch.arange(length)[:, None].float())

    def forward(self, x):
        return self.layer(x) + self.offset


@pytest.mark.slow
def test_a_network_of_one_batch_size_is_exported_for_it_with_a_warning_or_told_what_to_do(tmp_path):
    x, path = torch.randn(4, 4), tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"OneLength runs on the example inputs, but not .*dynamic_batch=False"):
        intrafusion.export(OneLength(4), path, x, dynamic_batch=True)
    assert not path.exists()
    with pytest.warns(UserWarning, match="exported for batches of 4"):
        intrafusion.export(model := OneLength(4).eval(), path, x)
    torch.testing.assert_close(run(path, x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_half_precision_has_a_tolerance_of_its_own(tmp_path):
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).half().eval()
    x = torch.randn(2, 64).half()
    assert intrafusion.export(model, tmp_path / "model.onnx", x).difference < 1.6e-2
    with pytest.raises(ExportError, match=r"tolerance=1\.0e-09"):
        intrafusion.export(model, tmp_path / "model.onnx", x, tolerance=1e-9)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_names_the_reason_and_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    model, x = pico("mlp")
    path = tmp_path / "model.onnx"
    path.write_text("before")
    with pytest.raises(ExportError, match=r"Branching cannot be exported: .*data-dependent"):
        intrafusion.export(Branching(), path, torch.ones(2))
    with pytest.raises(
        ExportError, match=r"Mlp does not run on inputs of \[\[\d+, \d+, 3\]\]: .*shapes cannot be multiplied"
    ):
        intrafusion.export(model, path, x[..., :3])
    with pytest.raises(ExportError, match=r"differs from the network by \d\.\de-\d\d of its largest output"):
        intrafusion.export(model, path, x, tolerance=0.0)
    model.head.bias.data[0] = float("nan")
    with pytest.raises(ExportError, match="differs from the network by nan"):
        intrafusion.export(model, path, x)
    with pytest.raises(TypeError, match="example_inputs"):
        intrafusion.export(model, path, (3, "x"))
    with pytest.raises(TypeError, match="must be an nn"):
        intrafusion.export(model.state_dict(), path, x)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ExportError, match=r"exporting needs onnxscript: pip install 'intrafusion\[export\]'"):
        intrafusion.export(model, path, x)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "mlp"])
def test_torch_export_takes_a_pruned_network(name):
    model, x = pico(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "mlp"])
def test_torch_compile_takes_a_pruned_network(name):
    """With the backend that traces forward and backward but needs no C++ compiler."""
    model, x = pico(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
