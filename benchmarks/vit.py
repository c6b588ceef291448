"""A ViT on CIFAR-10 pruned without fine-tuning: every kind of width, every method in one command.

    INTRAFUSION_DATA=../shared/data python -m benchmarks.vit              # about half an hour on one core
    INTRAFUSION_DATA=../shared/data python -m benchmarks.vit --kind head_dim --ratio 0.5

The checkpoint vit_cifar10 (trained by others); accuracy on the 10,000 test images and the divergence from the dense
network's predictions. Methods that see images get 1,000 of the training half, unlabelled; nothing is chosen on the test
half.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn import functional as F

from benchmarks.importances import outputs, vit
from benchmarks.language.methods import METHODS, pruned
from benchmarks.paper_parity import data_folder

KINDS = {
    "feed_forward": ("feed_forward",),
    "heads": ("heads",),
    "head_dim": ("head_dim",),
    "stream": ("stream",),
    "feed_forward+head_dim": ("feed_forward", "head_dim"),
    "all": ("feed_forward", "head_dim", "stream"),
}
SHOWN = (
    "discard",
    "barycentre",
    "data-free",
    "FLAP",
    "CORP",
    "MoDeGPT",
    "OSSCAR",
    "SliceGPT",
    "calibrated, L1",
    "calibrated",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="of width (may be repeated)")
    parser.add_argument("--ratio", type=float, action="append", help="default 0.3 0.5 0.7 (may be repeated)")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--images", type=int, default=1000, help="unlabelled ones that methods may see")
    arguments = parser.parse_args()
    dense, data, _ = vit(data_folder(parser))
    shown = [batch for batch, _ in data.draw("train", arguments.images, seed=0)]
    test = data.split("test")
    judged = [data.normalise(test.read(part)) for part in torch.arange(len(test)).split(500)]
    truth = outputs(dense, judged)
    print(f"dense: {(truth.argmax(1) == test.labels).double().mean() * 100:.2f} % of {len(test)} images")
    print("| width | removed | method | accuracy | KL to dense | parameters | processor s |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for kind in arguments.kind or KINDS:
        for ratio in arguments.ratio or (0.3, 0.5, 0.7):
            for name in arguments.method or SHOWN:
                began = time.process_time()
                model, _ = pruned(dense, name, dict.fromkeys(KINDS[kind], ratio), shown)
                seconds = time.process_time() - began
                found = outputs(model, judged)
                accuracy = (found.argmax(1) == test.labels).double().mean() * 100
                divergence = F.kl_div(found, truth, log_target=True, reduction="batchmean")
                size = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
                numbers = f"{accuracy:.2f} | {divergence:.4f} | {size:.0%} | {seconds:.0f}"
                print(f"| {kind} | {ratio:.0%} | {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
