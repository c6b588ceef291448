"""What carrying the optimizer over is worth: training loss after a pruning step, with its state carried and without.

    python -m benchmarks.warm_start                 # digits, offline; some minutes on two cores

A small network of `examples/digits.py` trains for four epochs, loses a part of its channels (calibrated on its training
images), and trains on, either with `transfer_optimizer_state` or with a new optimizer of the same settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch_pruning as tp
from torch.nn.functional import cross_entropy

import intrafusion

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

OPTIMIZERS: dict[str, Callable] = {
    "SGD, momentum 0.9": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-3),
}
BEFORE, WINDOWS = 4, ((0, 3), (3, 10), (10, 19), (19, 38))


def losses_after(make: Callable, seed: int, ratio: float, carry: bool) -> list[float]:
    """Mean training loss in each window of steps after the pruning step."""
    torch.manual_seed(seed)
    train, _ = digits.loaders()
    train.generator.manual_seed(seed)  # type: ignore[union-attr]
    model = digits.network()
    optimizer, losses = make(model.parameters()), []
    for epoch in range(BEFORE + 2):
        if epoch == BEFORE:
            pruner = intrafusion.IntraFusionPruner(
                model,
                digits.example_input(),
                tp.importance.GroupMagnitudeImportance(p=1),
                pruning_ratio=ratio,
                ignored_layers=[model[-1]],
                fusion="calibrated",
                calibration=[images for images, _ in train],
            )
            pruner.step()
            if carry:
                intrafusion.transfer_optimizer_state(optimizer, pruner)
            else:
                optimizer = make(model.parameters())
        model.train()
        for images, labels in train:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch >= BEFORE:
                losses.append(loss.item())
    return [sum(losses[a:b]) / (b - a) for a, b in WINDOWS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=0.3)
    options = parser.parse_args()
    print("| optimizer | its state | " + " | ".join(f"steps {a + 1} to {b}" for a, b in WINDOWS) + " |")
    print("| --- " * (2 + len(WINDOWS)) + "|")
    for name, make in OPTIMIZERS.items():
        for label, carry in (("carried", True), ("new", False)):
            runs = [losses_after(make, seed, options.ratio, carry) for seed in range(options.seeds)]
            means = [sum(run[i] for run in runs) / len(runs) for i in range(len(WINDOWS))]
            print(f"| {name} | {label} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main()
