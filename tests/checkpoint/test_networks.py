"""Networks that people prune, written here and read in a process that has never seen the pruner."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torchvision.models.vision_transformer import VisionTransformer

import intrafusion
from intrafusion.lab.models import build_model, example_input
from tests.checkpoint.networks import pruner_of, randomise

NETWORKS = {
    "cifar_resnet20": 32,
    "cifar_vgg11_bn": 32,
    "torchvision:resnet50": 32,
    "torchvision:mobilenet_v2": 32,
    "torchvision:convnext_tiny": 32,
    "torchvision:vit_b_32": 224,
}

READER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from intrafusion import load

for path in map(Path, sys.argv[1:]):
    model = load(path)
    expected = load_file(path.with_suffix(".expected"))
    x, y = expected.pop("input"), expected.pop("output")
    with torch.no_grad():
        assert torch.equal(model(x), y), path
    state = model.state_dict()
    assert state.keys() == expected.keys(), path
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items()), path
assert not {"torch_pruning", "intrafusion.prune.pruner", "intrafusion.lab"} & sys.modules.keys()
print(json.dumps(len(sys.argv) - 1))
"""


@pytest.mark.slow
def test_networks_come_back_in_a_fresh_process(tmp_path):
    from safetensors.torch import save_file

    paths = []
    for number, (source, size) in enumerate(NETWORKS.items()):
        model = randomise(build_model(source, 10))
        heads = {}
        if isinstance(model, VisionTransformer):
            heads = {layer.self_attention: layer.num_heads for layer in model.encoder.layers}
        dense = sum(parameter.numel() for parameter in model.parameters())
        ignored = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1:]
        if source == "cifar_resnet20":  # its zero-padded shortcuts fix the width of the residual stream
            ignored += [module for name, module in model.named_modules() if name.endswith("conv2") or name == "conv1"]
        pruner_of(model, example_input((3, size, size)), ignored, num_heads=heads)
        if isinstance(model, VisionTransformer):
            model.hidden_dim = model.conv_proj.out_channels
        assert sum(parameter.numel() for parameter in model.parameters()) < 0.7 * dense
        path = tmp_path / f"{number}.safetensors"
        intrafusion.save(model.eval(), path, source=source, num_classes=10)
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = {"input": x, "output": model(x), **model.state_dict()}
        save_file(expected, path.with_suffix(".expected"))
        paths.append(str(path))
    command = [sys.executable, "-W", "error", "-c", READER, *paths]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == len(NETWORKS)
