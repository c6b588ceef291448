"""The published Intra-Fusion numbers, reproduced: `fusion="paper"` against the published code, cell by cell.

    INTRAFUSION_DATA=../shared/data python benchmarks/paper_parity.py            # about 40 minutes on 2 cores
    INTRAFUSION_DATA=../shared/data python benchmarks/paper_parity.py --quick    # all groups at once only

Expected figures were made with the published code on the same two checkpoints: L1 importance over the group, uniform
masses, L1 cost, features = filters + readers, bf16 evaluation of the 10,000 test images. What differs here on purpose:

* batch-norm is folded with its `eps`; the published code leaves it out;
* nothing else: groups go from the output to the input, each one scored and planned on the already pruned network.

The row "without eps" leaves `eps` out as well; "scored at once" keeps the channels that torch-pruning keeps, all scored
on the dense network; "costs moved by 0.1 %" shows how far a figure moves if the plan's costs are perturbed that little.

A finished cell is kept in --results and not computed again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch_pruning as tp
from torch import nn

from intrafusion import Fusion, IntraFusionPruner
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import image_folder
from intrafusion.lab.models import build_model
from intrafusion.lab.weights import load_weights_
from intrafusion.ot import pairwise_cost

RATIOS = (0.3, 0.5, 0.7)
HERE = Path(__file__).parent
ARCHIVE = "cifar10-jpeg.tar.gz"
NETWORKS = {
    "VGG11-BN": ("cifar_vgg11_bn", "vgg11_bn_cifar10", "features.{}.", (25, 22, 18, 15, 11, 8, 4, 0)),
    "ResNet-20": (
        "cifar_resnet20",
        "resnet20_cifar10",
        "layer{}.conv1",
        ("3.2", "3.1", "3.0", "2.2", "2.1", "2.0", "1.2", "1.1", "1.0"),
    ),
}
PAPER = Fusion.preset("paper")
WITHOUT_EPS = "without eps"
NUDGED = "costs moved by 0.1 %"
VARIANTS = {
    WITHOUT_EPS: PAPER,
    f"{NUDGED} (1)": PAPER,
    f"{NUDGED} (2)": PAPER,
    f"{NUDGED} (3)": PAPER,
    "scored at once": replace(PAPER, rescore=False),
    "importance masses": replace(PAPER, source_mass="importance", target_mass="importance"),
    "GMM targets": replace(PAPER, targets="gmm"),
    "k-means targets": replace(PAPER, targets="kmeans"),
    "p = 2": replace(PAPER, cost="l2"),
    "cosine": replace(PAPER, cost="cosine"),
    "barycentre": replace(PAPER, merge="barycentre"),
    "free target masses": replace(PAPER, target_mass="free"),
}


def expected() -> dict[str, dict[str, list[list[float]]]]:
    """{network: {group: [[discard, fused] at 30, 50, 70 %]}} of the published code."""
    return json.loads((HERE / "paper_parity_expected.json").read_text())["tables"]


def load(network: str, root: Path) -> tuple[nn.Module, list[str]]:
    name, checkpoint, pattern, numbers = NETWORKS[network]
    model = build_model(name)
    load_weights_(model, root / "checkpoints" / f"{checkpoint}.safetensors")
    return model.eval(), [pattern.format(number).rstrip(".") for number in numbers]


def data_folder(parser: argparse.ArgumentParser) -> Path:
    """The folder that INTRAFUSION_DATA names; the parser's error if there is none."""
    root = os.environ.get("INTRAFUSION_DATA")
    if not root:
        parser.error("set INTRAFUSION_DATA to the folder that has checkpoints/ and cifar10-jpeg.tar.gz in it")
    return Path(root)


def images(root: Path, **settings: Any) -> Dataset:
    """CIFAR-10 in the folder that also holds the checkpoints, which may hold archives of other images too."""
    archive = root / ARCHIVE
    return image_folder(archive if archive.is_file() else root, **settings)


def pruned(dense: nn.Module, roots: list[str], ratio: float, fusion: Fusion, method: str = "", **ours) -> nn.Module:
    """A pruned copy of the dense network: the groups of `roots`, all else left alone."""
    model = copy.deepcopy(dense)
    if method == WITHOUT_EPS:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    weighted = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    pruner = IntraFusionPruner(
        model,
        torch.zeros(1, 3, 32, 32),
        tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=[m for name, m in weighted.items() if name not in roots],
        fusion=fusion,
        **ours,
    )
    with mock.patch("intrafusion.ot.plan.pairwise_cost", nudged(method)) if NUDGED in method else nullcontext():
        pruner.step()
    return model


def nudged(method: str) -> Callable:
    """The distances multiplied by 1 + 0.001 times a normal number; the digit in the method's name is the seed."""
    generator = torch.Generator().manual_seed(int(method[-2]))

    def cost(*args):
        exact = pairwise_cost(*args)
        return exact * (1 + 1e-3 * torch.randn(exact.shape, generator=generator, dtype=exact.dtype)).clamp(min=0)

    return cost


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Per cent of the test images, in bf16 as the published figures were measured."""
    model = model.to(memory_format=torch.channels_last)
    correct = total = 0
    for images, labels in data.batches("test", 500):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.to(memory_format=torch.channels_last))
        correct, total = correct + int((logits.argmax(1) == labels).sum()), total + len(labels)
    return 100 * correct / total


def cells(networks: list[str], quick: bool) -> Iterator[tuple[str, str, list[str], float, str, Fusion]]:
    """(network, group, roots, ratio, method, fusion), single groups first."""
    for network in networks:
        *single, together = expected()[network]
        roots = NETWORKS[network][2:]
        names = [roots[0].format(number).rstrip(".") for number in roots[1]]
        for group in [] if quick else single:
            for ratio in RATIOS:
                yield network, group, [group], ratio, "discard", PAPER.discarded()
                yield network, group, [group], ratio, "paper", PAPER
        for ratio in RATIOS:
            yield network, together, names, ratio, "discard", PAPER.discarded()
            yield network, together, names, ratio, "paper", PAPER
            for method, fusion in VARIANTS.items():
                yield network, together, names, ratio, method, fusion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("INTRAFUSION_DATA"), help="folder with the checkpoints"
    )
    parser.add_argument("--network", choices=NETWORKS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="all groups at once only")
    parser.add_argument("--results", type=Path, default=Path("runs/paper_parity.jsonl"))
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the folder with the data: --data, or the variable INTRAFUSION_DATA")
    networks = arguments.network or list(NETWORKS)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    done = {tuple(row[:4]): row[4] for row in map(json.loads, lines)}
    dense = {network: load(network, Path(arguments.data))[0] for network in networks}
    data = images(Path(arguments.data))
    for network, group, roots, ratio, method, fusion in cells(networks, arguments.quick):
        if (network, group, ratio, method) in done:
            continue
        value = accuracy(pruned(dense[network], roots, ratio, fusion, method), data)
        done[network, group, ratio, method] = value
        with arguments.results.open("a") as file:
            file.write(json.dumps([network, group, ratio, method, value]) + "\n")
    report(done, networks, arguments.quick)


def report(done: dict, networks: list[str], quick: bool) -> None:
    """Print the tables, and how far the worst cell is from the published figure."""
    for network in networks:
        print(f"\n{network}: test accuracy in %, discard -> fused (published discard -> fused)")
        worst = (0.0, "")
        for group, published in expected()[network].items():
            if (network, group, RATIOS[0], "paper") not in done:
                continue
            line = []
            for ratio, (their_discard, their_fused) in zip(RATIOS, published, strict=True):
                ours = [done[network, group, ratio, method] for method in ("discard", "paper")]
                line.append(f"{ours[0]:5.2f} -> {ours[1]:5.2f} ({their_discard:5.2f} -> {their_fused:5.2f})")
                if group != "all at once":
                    worst = max(worst, (abs(ours[1] - their_fused), f"{group} at {ratio:.0%}"))
            print(f"  {group:16} " + "   ".join(line))
        if not quick:
            print(f"  furthest single-group cell: {worst[1]}, {worst[0]:.2f} points")
        for method in VARIANTS:
            values = [done[network, "all at once", ratio, method] for ratio in RATIOS]
            print(f"  {method:24} all at once: " + " / ".join(f"{value:5.2f}" for value in values))


if __name__ == "__main__":
    main()
