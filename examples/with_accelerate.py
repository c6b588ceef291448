"""Prune while training with Accelerate, in one process or several (pip install 'intrafusion[accelerate]').

    python examples/with_accelerate.py
    torchrun --nproc_per_node 2 examples/with_accelerate.py

Every process makes the same calls, and chooses on the same inputs: the default fusion draws them from a seed
(calibration batches would have to be the same in every process). DistributedDataParallel is made for the parameters
that it is given, so the network is wrapped anew after a step that pruned.
"""

from __future__ import annotations

import torch
import torch_pruning as tp
from accelerate import Accelerator
from digits import accuracy, example_input, loaders, network, size
from torch.nn.functional import cross_entropy

import intrafusion

EPOCHS = 12


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    train, test = loaders()
    bare = network()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=2e-3)
    model, optimizer, train = accelerator.prepare(bare, optimizer, train)

    pruner = intrafusion.IntraFusionPruner(
        bare,
        example_input().to(accelerator.device),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        iterative_steps=3,
        ignored_layers=[bare[-1]],
    )
    schedule = intrafusion.FusionSchedule(pruner, optimizer, at=[4, 6, 8])  # counted in epochs

    accelerator.print(f"{size(bare)} parameters, {accelerator.num_processes} processes")
    for _ in range(EPOCHS):
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            accelerator.backward(cross_entropy(model(images), labels))
            optimizer.step()
        if schedule.step():
            accelerator.print(f"pruned to {size(bare)} parameters")
            if accelerator.num_processes > 1:
                model = accelerator.prepare_model(bare)
    total = torch.tensor([sum(float(p.detach().double().sum()) for p in bare.parameters())], dtype=torch.float64)
    totals = accelerator.gather(total)
    accelerator.print(f"{size(bare)} parameters, accuracy {accuracy(bare, test):.2f} %")
    accelerator.print(f"weights equal in all processes: {bool((totals == totals[0]).all())}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
