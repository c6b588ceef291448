"""Prune while training with Lightning: a callback of ten lines (pip install 'intrafusion[lightning]').

python examples/with_lightning.py
"""

from __future__ import annotations

import lightning
import torch
import torch_pruning as tp
from digits import accuracy, example_input, loaders, network, size
from torch import Tensor
from torch.nn.functional import cross_entropy

import intrafusion


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Fuse(lightning.Callback):
    """Prunes after the epochs `at`. (One process: under DDP, Lightning keeps references to the old parameters.)"""

    def __init__(self, at: list[int]) -> None:
        self.at = at

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.world_size > 1:
            raise RuntimeError("Lightning wraps the network once, for all epochs: prune in one process")
        model = pl_module.network
        pruner = intrafusion.IntraFusionPruner(
            model,
            example_input().to(pl_module.device),
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            iterative_steps=len(self.at),
            ignored_layers=[model[-1]],
            fusion="calibrated",
            calibration=[images for images, _ in trainer.train_dataloader],
        )
        self.schedule = intrafusion.FusionSchedule(pruner, trainer.optimizers[0], at=self.at)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            if self.schedule.step():
                print(f"pruned to {size(pl_module.network)} parameters")


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    train, test = loaders()
    module = Digits()
    print(f"{size(module)} parameters")
    trainer = lightning.Trainer(
        max_epochs=12,
        accelerator="cpu",
        callbacks=[Fuse(at=[4, 6, 8])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train)
    print(f"{size(module)} parameters, accuracy {accuracy(module.network, test):.2f} %")


if __name__ == "__main__":
    main()
