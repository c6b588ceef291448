"""Unequal widths on the CIFAR-10 networks: what moving channels between groups gives, and what it gives the plain cut.

    INTRAFUSION_DATA=../shared/data python -m benchmarks.allocation --network ResNet-20 --ratio 0.5

L1 importance, no fine-tuning, accuracy on the 10,000 test images. `equal` has the same ratio in every group. The other
widths are measured on 1,000 unlabelled training images (`data-free`: on synthetic ones) by the method of the row; the
plain cut gets the widths of the rows above it. `--descent 1000` adds what so many steps of all layers together make of
the method, with the same widths, channels and images.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch_pruning as tp
from torch import nn

from benchmarks import paper_parity
from benchmarks.rivals.cells import Network
from intrafusion import Fusion, IntraFusionPruner
from intrafusion.lab.measure import count_macs, count_parameters, hits
from intrafusion.prune.checks import ALLOCATIONS

METHODS = ("calibrated", "data-free")


def pruned(
    network: Network, ratios: Mapping[str, float], fusion: Fusion, allocation: str, images: int
) -> tuple[nn.Module, Mapping[str, float]]:
    """A pruned copy, and the ratio of every group by the name of its first layer."""
    model = copy.deepcopy(network.dense).eval()
    others = (nn.Conv2d, nn.Linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = IntraFusionPruner(
            model,
            network.example,
            tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.0,
            pruning_ratio_dict={model.get_submodule(name): ratio for name, ratio in ratios.items()},
            ignored_layers=[m for name, m in model.named_modules() if isinstance(m, others) and name not in ratios],
            fusion=fusion,
            calibration=network.images(images, 0) if fusion.method().inputs == "calibration" else None,
            allocation=allocation,
        )
        pruner.step()
    found = pruner.report.allocation
    return model.eval(), ratios if found is None else found.ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("ResNet-20", "VGG11-BN"), default="ResNet-20")
    parser.add_argument("--ratio", type=float, action="append", help="default 0.5 0.7 (may be repeated)")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--widths", choices=ALLOCATIONS, action="append", help="only these (may be repeated)")
    parser.add_argument("--descent", type=int, default=0, help="so many steps of descent behind each method too")
    parser.add_argument("--images", type=int, default=1000, help="unlabelled ones that methods may see")
    arguments = parser.parse_args()
    root = paper_parity.data_folder(parser)
    network = Network(arguments.network, *paper_parity.load(arguments.network, root), paper_parity.images(root))
    macs, parameters = count_macs(network.dense.eval(), network.example), count_parameters(network.dense)
    print("| network | removed | widths | method | accuracy | MACs | parameters | processor s |")
    print("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |")
    for ratio in arguments.ratio or (0.5, 0.7):
        for fusion in arguments.method or METHODS:
            for allocation in arguments.widths or ALLOCATIONS:
                ratios: Mapping[str, float] = dict.fromkeys(network.roots or (), ratio)
                tried = {fusion: Fusion.preset(fusion)}
                if arguments.descent:
                    tried[f"{fusion}, {arguments.descent} steps"] = replace(tried[fusion], descent=arguments.descent)
                tried["discard"] = Fusion.preset("discard")
                for method, settings in tried.items():
                    began = time.process_time()
                    asked = allocation if method == fusion else "equal"
                    model, ratios = pruned(network, ratios, settings, asked, arguments.images)
                    seconds = time.process_time() - began
                    accuracy = hits(model, network.data, progress=False).double().mean().item() * 100
                    left = count_macs(model, network.example) / macs, count_parameters(model) / parameters
                    shown = f"{accuracy:.2f} | {left[0]:.1%} | {left[1]:.1%} | {seconds:.0f}"
                    print(f"| {network.name} | {ratio:.0%} | {allocation} | {method} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
