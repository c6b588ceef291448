"""Two networks trained on two halves of the digits, from one initialisation and from two: what averaging them gives.

    python -m benchmarks.align            # about a minute on one core

The same functions take any data set and network of the lab: `trained`, `accuracies`.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from torch import nn

import intrafusion
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import digits
from intrafusion.lab.landscape.loss import interpolate, score
from intrafusion.lab.models import build_model
from intrafusion.lab.recipe.sections import TrainSection
from intrafusion.lab.split.schedules import Ensemble
from intrafusion.lab.training import train_

METHODS = ("matching", "weights", "activations")


def trained(data: Dataset, model: str, settings: TrainSection, *, seed: int) -> nn.Module:
    """A network trained on `data` from the initialisation `seed`."""
    torch.manual_seed(seed)
    network = build_model(model, len(data.classes))
    train_(network, data, settings, progress=False)
    return network


def accuracies(first: nn.Module, second: nn.Module, data: Dataset, *, images: int) -> dict[str, float]:
    """Test accuracy in percent of the two networks, their ensemble, and their averages of every kind."""
    batches = [inputs for inputs, _ in data.draw("train", images, seed=0)]
    example = batches[0][:2]
    found = {"first": score(first, data).accuracy, "second": score(second, data).accuracy}
    found["ensemble"] = score(Ensemble([first, second]), data).accuracy
    for by in ("given", *METHODS):
        more = {"batches": batches} if by == "activations" else {}
        for kind, options in (
            ("", {"repair": "none"}),
            (" + closed form", {"repair": "statistics"}),
            (" + re-estimated", {"repair": "statistics", "batches": batches}),
            (" + refitted, no images", {}),
            (" + refitted", {"batches": batches}),
        ):
            if by == "activations" and kind in (" + closed form", " + refitted, no images"):
                continue  # it takes images
            fused = intrafusion.fuse([first, second], example, by=by, progress=False, **{**more, **options})
            found[("naive" if by == "given" else by) + kind] = score(fused, data).accuracy
    return {name: 100 * accuracy for name, accuracy in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=250, help="unlabelled training images for the statistics")
    chosen = parser.parse_args()
    for title, apart in (("one initialisation", 0), ("two initialisations", 1000)):
        runs = []
        for seed in range(chosen.seeds):
            settings = TrainSection(epochs=chosen.epochs, seed=seed)
            parts = digits().parts(2, seed=seed)
            pair = [trained(part, "digits_cnn", settings, seed=seed + apart * at) for at, part in enumerate(parts)]
            runs.append(accuracies(pair[0], pair[1], digits(), images=chosen.images))
            path = interpolate(pair[0], pair[1], partial(score, data=digits()), steps=5, progress=False)
            aligned = intrafusion.align(pair[1], pair[0], torch.zeros(2, 1, 8, 8)).apply(pair[1])
            straight = interpolate(pair[0], aligned, partial(score, data=digits()), steps=5, progress=False)
            runs[-1] |= {"loss barrier": path.barrier, "loss barrier, aligned": straight.barrier}
        print(f"\n{title}, {chosen.seeds} seeds: mean (lowest-highest)")
        for name in runs[0]:
            values = [run[name] for run in runs]
            print(f"  {name:28s} {statistics.mean(values):6.2f} ({min(values):.2f}-{max(values):.2f})")


if __name__ == "__main__":
    main()
