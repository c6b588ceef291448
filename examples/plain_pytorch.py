"""Prune while training, in a plain PyTorch loop: half the channels, in three steps, with an averaged network.

    python examples/plain_pytorch.py

Optimizer, learning-rate schedule and average go on over every pruning step.
"""

from __future__ import annotations

import torch
import torch_pruning as tp
from digits import accuracy, example_input, loaders, network, size
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import intrafusion

EPOCHS = 12


def main() -> None:
    torch.manual_seed(0)
    train, test = loaders()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * len(train))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)

    pruner = intrafusion.IntraFusionPruner(
        model,
        example_input(),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        iterative_steps=3,
        iterative_pruning_ratio_scheduler=intrafusion.cubic_scheduler,
        ignored_layers=[model[-1]],
        fusion="calibrated",
        calibration=[images for images, _ in train],
    )
    at = [epoch * len(train) for epoch in (4, 6, 8)]
    schedule = intrafusion.FusionSchedule(pruner, optimizer, at=at, ema=ema)

    print(f"{'epoch':>5} {'parameters':>10} {'accuracy':>8} {'averaged':>8}")
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for images, labels in train:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            ema.update_parameters(model)
            if schedule.step():
                print(f"pruned to {size(model)} parameters")
        print(f"{epoch:5} {size(model):10} {accuracy(model, test):8.2f} {accuracy(ema, test):8.2f}")
    print(schedule.report)


if __name__ == "__main__":
    main()
