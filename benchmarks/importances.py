"""Which channels stay: L1 magnitude against scores that look at what is read, cut and fused, without fine-tuning.

    INTRAFUSION_DATA=FOLDER python -m benchmarks.importances    # about half an hour on one core
    python -m benchmarks.importances --network "layer-norm MLP"  # one of `benchmarks.kinds`, offline

`ViT`: the feed-forward groups of checkpoints/vit_cifar10.safetensors, a timm VisionTransformer that others trained, and
10,000 test images. The others: every group but the classifier's, on digits. Scores and `calibrated` see the same 500
unlabelled training images. Accuracy in %, and how far the outputs are from the dense ones (KL, nats).
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kinds import KINDS, trained
from benchmarks.paper_parity import images
from benchmarks.rivals.methods import prune
from intrafusion import FLAPImportance, Fusion, ReconstructionImportance, WandaImportance
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import digits
from intrafusion.lab.weights import load_weights_
from intrafusion.models import named_model

RATIOS = (0.3, 0.5)
FUSIONS = ("discard", "calibrated")
IMPORTANCES: dict[str, Callable[[list[Tensor]], Any]] = {
    "L1": lambda batches: tp.importance.GroupMagnitudeImportance(p=1),
    "Wanda": WandaImportance,
    "FLAP": FLAPImportance,
    "reconstruction, no images": lambda batches: ReconstructionImportance(),
    "backward, no images": lambda batches: ReconstructionImportance(search="backward"),
    "reconstruction": ReconstructionImportance,
    "backward": lambda batches: ReconstructionImportance(batches, search="backward"),
}
VIT = "ViT"


def vit(root: Path) -> tuple[nn.Module, Dataset, list[str]]:
    """The network in eval mode, its images, and the first layers of its feed-forward groups."""
    model = named_model("cifar_vit")
    load_weights_(model, root / "checkpoints" / "vit_cifar10.safetensors")
    data = images(root, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), train_images=2000, progress=False)
    return model.eval(), data, [f"blocks.{number}.mlp.fc1" for number in range(4)]


@torch.no_grad()
def outputs(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """[N, classes] log-probabilities."""
    return torch.cat([F.log_softmax(model(batch).double(), dim=1) for batch in batches])


def rows(network: str, root: Path | None) -> Iterable[str]:
    """The table of one network, line by line."""
    if network == VIT:
        assert root is not None
        dense, data, roots = vit(root)
    else:
        data, roots = digits(), None
        dense = trained(network, data)
    shown = [batch for batch, _ in data.draw("train", 500, seed=0)]
    test = data.split("test")
    judged = [data.normalise(test.read(part)) for part in torch.arange(len(test)).split(500)]
    truth = outputs(dense, judged)
    for ratio in RATIOS:
        for name, make in IMPORTANCES.items():
            cells = []
            for fusion in FUSIONS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = prune(
                        Fusion.preset(fusion), dense, roots, ratio, make(shown), torch.zeros(1, *data.shape),
                        images=shown,
                    )  # fmt: skip
                found = outputs(model.eval(), judged)
                accuracy = (found.argmax(1) == test.labels).double().mean() * 100
                divergence = F.kl_div(found, truth, log_target=True, reduction="batchmean")
                cells += [f"{accuracy:.1f}", f"{divergence:.4f}"]
            yield f"| {network} | {ratio:.0%} | {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", choices=[VIT, *KINDS], action="append", help="only this one (may be repeated)")
    arguments = parser.parse_args()
    root = os.environ.get("INTRAFUSION_DATA")
    print(f"| network | removed | importance | {' | '.join(f'{fusion} | KL' for fusion in FUSIONS)} |")
    print("| --- | ---: | --- |" + " ---: |" * 2 * len(FUSIONS))
    for network in arguments.network or [*([VIT] if root else []), *KINDS]:
        for row in rows(network, Path(root) if root else None):
            print(row, flush=True)


if __name__ == "__main__":
    main()
