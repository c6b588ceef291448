"""What is saved by keeping the outputs of layers from one forward pass to the next, while a network is corrected.

    python -m benchmarks.memo --network cifar_resnet20      # four minutes on one core; prints the table
    python -m benchmarks.memo                               # and cifar_vgg11_bn

Every row prunes half of the channels on given images (`calibrated`), or fuses two networks on them, with outputs kept
(`intrafusion/correct/memo.py`) and without, and checks that the networks are the same, bit for bit. Times are processor
seconds, which do not count the pauses that other programs cause. Weights and images are random.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial

import torch
import torch_pruning as tp
from torch import Tensor, nn

import intrafusion
from intrafusion.average import consensus
from intrafusion.correct import sequential
from intrafusion.correct.memo import Room
from intrafusion.lab.models import build_model
from intrafusion.lab.pruning import ignored_layers
from intrafusion.lab.reports.tables import markdown_table
from intrafusion.lab.weights import digest

NETWORKS = {"cifar_resnet20": ("conv1", "layer*.conv2", "linear"), "cifar_vgg11_bn": ("classifier",)}
"""Names, and the layers that are left alone."""


def prune(name: str, batches: list[Tensor]) -> nn.Module:
    model = _network(name, 0)
    intrafusion.IntraFusionPruner(
        model, batches[0][:1], tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.5,
        ignored_layers=ignored_layers(model, NETWORKS[name]), fusion="calibrated", calibration=batches,
    ).step()  # fmt: skip
    return model


def fuse(name: str, batches: list[Tensor]) -> nn.Module:
    return intrafusion.fuse([_network(name, 0), _network(name, 1)], batches[0][:1], batches=batches, progress=False)


def compare(work: Callable[[], nn.Module]) -> tuple[float, float]:
    """Processor seconds without outputs kept, and with them. Raises AssertionError if the networks differ."""
    seconds, digests = [], []
    for room in (partial(Room, 0), Room):
        for module in (sequential, consensus):
            module.Room = room  # type: ignore[attr-defined]
        start = time.process_time()
        digests.append(digest(work()))
        seconds.append(time.process_time() - start)
    assert digests[0] == digests[1], "the networks differ"
    return seconds[0], seconds[1]


def _network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, 10).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="both, if none is named")
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = list(torch.randn(options.images, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(250))
    rows = []
    for name in options.network or NETWORKS:
        for label, work in (("calibrated", prune), ("fuse", fuse)):
            before, after = compare(partial(work, name, batches))
            rows.append([name, label, f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}"])
            print(*rows[-1])
    print(markdown_table(["network", "what", "s, nothing kept", "s, outputs kept", "ratio"], rows, "llrrr"))
    print(f"most memory at any time: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
