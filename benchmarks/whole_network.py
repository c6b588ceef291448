"""Whole networks pruned without fine-tuning: discarded, fused as published, and ours without and with images.

    INTRAFUSION_DATA=../shared/data python -m benchmarks.whole_network                    # an hour or two on 2 cores
    INTRAFUSION_DATA=../shared/data python -m benchmarks.whole_network --network ResNet-20 --ratio 0.5   # minutes

Every group that torch-pruning prunes except the classifier (ResNet-20: its nine within-block groups), L1 importance,
accuracy on the 10,000 test images in fp32. `data-free` sees no image at all; `calibrated` sees 1,000 unlabelled
training images. Nothing is chosen on the test images. A finished cell is kept in --results and not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.paper_parity import NETWORKS, RATIOS, load, pruned
from intrafusion import Fusion
from intrafusion.lab.data import Dataset, image_folder
from intrafusion.lab.measure import evaluate

METHODS = ("discard", "paper", "data-free", "calibrated")
IMAGES = 1000


def calibration_images(data: Dataset, count: int = IMAGES, seed: int = 0) -> list[torch.Tensor]:
    """Normalised training images without their labels, in batches of at most 250."""
    train = data.split("train")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    return [data.normalise(train.images[part]) for part in chosen.split(250)]


def prune(dense: nn.Module, roots: list[str], ratio: float, method: str, data: Dataset) -> nn.Module:
    """A pruned copy of the dense network."""
    fusion = Fusion.preset(method)
    images = calibration_images(data) if fusion.correct == "calibrated" else None
    return pruned(dense, roots, ratio, fusion, calibration=images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("INTRAFUSION_DATA"), help="folder with the checkpoints"
    )
    parser.add_argument("--network", choices=NETWORKS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--ratio", type=float, choices=RATIOS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--results", type=Path, default=Path("runs/whole_network.jsonl"))
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the folder with the data: --data, or the variable INTRAFUSION_DATA")
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    done = {tuple(row[:3]): row[3:] for row in map(json.loads, lines)}
    data = image_folder(Path(arguments.data))
    networks, ratios = arguments.network or list(NETWORKS), arguments.ratio or RATIOS
    for network in networks:
        dense, roots = load(network, Path(arguments.data))
        for ratio in ratios:
            for method in METHODS:
                if (network, ratio, method) in done:
                    continue
                start = time.perf_counter()
                model = prune(dense, roots, ratio, method, data)
                seconds = time.perf_counter() - start
                done[network, ratio, method] = [evaluate(model, data).percent, seconds]
                with arguments.results.open("a") as file:
                    file.write(json.dumps([network, ratio, method, *done[network, ratio, method]]) + "\n")
    print("| network | removed | " + " | ".join(METHODS) + " |")
    print("| --- | ---: |" + " ---: |" * len(METHODS))
    for network in networks:
        for ratio in ratios:
            cells = [f"{done[network, ratio, m][0]:.2f} ({done[network, ratio, m][1]:.0f} s)" for m in METHODS]
            print(f"| {network} | {ratio:.0%} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
