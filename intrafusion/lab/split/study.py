"""What a run with a section ``split`` measures, and how its results are read from its folder again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from intrafusion.lab.errors import LabError
from intrafusion.lab.folder import ENVIRONMENT, RESULTS, read_json, read_recipe_of
from intrafusion.lab.measure import Accuracy
from intrafusion.lab.recipe.loader import Recipe
from intrafusion.lab.results import LineStore

Method = Literal[
    "part", "whole", "ensemble", "naive", "naive repaired", "aligned", "aligned statistics", "aligned repaired",
    "paf", "fap", "whole fused", "whole discard",
]  # fmt: skip
AVERAGES: tuple[Method, ...] = ("naive", "naive repaired", "aligned", "aligned statistics", "aligned repaired")
"""In the order of a report; as they are, with their batch-norm statistics put right, repaired as the recipe says."""
OF_WHOLE: tuple[Method, ...] = ("whole fused", "whole discard")
SPLIT = "split.json"
"""In the folder of a run: which lines of the results belong to it, in order, and how many images the parts have."""
PRUNED: dict[str, tuple[Method, ...]] = {"paf": ("paf",), "fap": ("fap",), "whole": OF_WHOLE}


@dataclass(frozen=True)
class Item:
    """One network to measure.

    Attributes:
        method: ``part`` and ``whole`` are trained networks; averages are in the given channels (``naive``) or aligned,
            as they are, with their batch-norm statistics put right, or repaired as the recipe says; the rest is pruned.
        init: of the parts' networks, ``same`` or ``different``; ``None`` where there are no parts.
        epochs: of fine-tuning.
    """

    method: Method
    seed: int
    init: str | None = None
    part: int | None = None
    ratio: float = 0.0
    epochs: int = 0

    def __str__(self) -> str:
        name = self.method if self.part is None else f"part {self.part}"
        words = [f"{self.ratio:.0%} {name}" if self.ratio else name, f"seed {self.seed}"]
        words += [f"{self.init} init"] if self.init else []
        return ", ".join([*words, *([f"{self.epochs} epochs of fine-tuning"] if self.epochs else [])])


@dataclass(frozen=True)
class Measured:
    """What an item is worth.

    Attributes:
        digest: of the network's state dict: equal for equal networks.
        seconds: wall clock of ``train``, ``prune``, ``fuse`` and ``finetune``, as far as they took part. What is done
            for every part at the same time counts once, with its slowest.
    """

    item: Item
    correct: int
    total: int
    params: int
    macs: int
    digest: str
    seconds: Mapping[str, float]

    @property
    def accuracy(self) -> Accuracy:
        """Correct and total as one value."""
        return Accuracy(self.correct, self.total)

    @property
    def total_seconds(self) -> float:
        """From the first training step to the network, with a worker for each part."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class SplitStudy:
    """The results of a recipe, as far as they are there, in the order of the items.

    Attributes:
        parts: training images of each part, for the first seed; together: of all parts, counted with repetitions.
    """

    recipe: Recipe
    results: tuple[Measured, ...]
    parts: tuple[int, ...]
    together: int
    environment: Mapping[str, str]


def open_results(folder: Path) -> LineStore[Measured]:
    """The results that are kept in a folder."""
    return LineStore(folder / RESULTS, _measured, asdict)


def read_split(folder: Path) -> tuple[SplitStudy, int]:
    """What a folder holds of a run with a section ``split``, finished or not, and how many items it is short of.

    Neither the networks nor the images need to be on this machine.

    Raises:
        LabError: a file in it is broken.
    """
    plan, store = read_json(folder / SPLIT), open_results(folder)
    try:
        found = [store.get(key) for key in plan["keys"]]
        sizes = tuple(plan["parts"]), int(plan["together"])
    except (KeyError, TypeError, ValueError) as error:
        raise LabError(f"{folder / SPLIT} is broken ({error!r}); run the recipe again to write it anew") from None
    results = tuple(result for result in found if result is not None)
    study = SplitStudy(read_recipe_of(folder), results, *sizes, read_json(folder / ENVIRONMENT))
    return study, len(found) - len(results)


def network_file(folder: Path, item: Item) -> Path:
    """Where a run keeps the pruned network of an item, for :func:`intrafusion.load`."""
    words = [item.method.replace(" ", "-"), *([item.init] if item.init else []), f"{item.ratio:.4g}"]
    tuned = f"-finetuned-{item.epochs}" if item.epochs else ""
    return folder / "networks" / f"{'-'.join(words)}-seed-{item.seed}{tuned}.safetensors"


def _measured(entry: dict[str, Any]) -> Measured:
    return Measured(Item(**entry["item"]), *(entry[name] for name in ("correct", "total", "params", "macs", "digest")),
                    seconds=dict(entry["seconds"]))  # fmt: skip
