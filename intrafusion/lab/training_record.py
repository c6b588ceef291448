"""``training.json``: how a recipe trained its dense network, beside the weights, and what a report says about it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from intrafusion.lab.errors import LabError
from intrafusion.lab.files import write_atomic
from intrafusion.training.noise_scale import NoiseHistory

TRAINING = "training.json"
_SHOWN = 12


@dataclass(frozen=True)
class TrainingRecord:
    """The training of a dense network.

    Attributes:
        key: of the network, as in the metadata of its weights.
        losses: mean training loss of epochs 1, 2, ...
    """

    key: str
    losses: tuple[float, ...]
    noise: NoiseHistory | None


def write_training(folder: Path, record: TrainingRecord) -> None:
    """Write the record into a folder."""
    write_atomic(folder / TRAINING, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def copy_training(record: TrainingRecord | None, folder: Path) -> None:
    """Make a folder's record this one, or none."""
    if record is None:
        (folder / TRAINING).unlink(missing_ok=True)
    else:
        write_training(folder, record)


def read_training(folder: Path) -> TrainingRecord | None:
    """The record in a folder, ``None`` if it has none.

    Raises:
        LabError: the file is broken.
    """
    path = folder / TRAINING
    if not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        noise = NoiseHistory.from_plain(entry["noise"]) if entry["noise"] else None
        return TrainingRecord(entry["key"], tuple(entry["losses"]), noise)
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path} is broken ({error!r}); remove it: only the report of the training needs it") from None


def noise_table(histories: Mapping[str, Sequence[NoiseHistory]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one per epoch, at most twelve: evenly spaced, with the first and the last.

    histories: trainings with the same settings by name; gradient variances are means over those of one name.
    """
    first = next(iter(histories.values()))[0]
    rows = []
    for number in _spread(len(first.epochs)):
        epoch = first.epochs[number]
        rows.append([str(epoch.epoch), f"{epoch.lr:.4g}", f"{epoch.scale:.4g}"])
        for alike in histories.values():
            same = [other for each in alike for other in each.epochs if other.epoch == epoch.epoch]
            known = [other.trace for other in same if other.trace is not None]
            rows[-1].append(f"{fmean(known):.4g}" if known else "")
    return ["epoch", "lr", "noise scale", *(f"gradient variance {name}".rstrip() for name in histories)], rows


def noise_note(noise: NoiseHistory) -> str:
    """What the columns are."""
    augmentation = f", augmentation {noise.augmentation}" if noise.augmentation else ""
    return (
        f"Noise scale: {noise.definition}, mean over the steps of an epoch. Gradient variance: trace of the covariance "
        "of one image's gradient after the epoch, estimated on held-out images without augmentation. Weight decay "
        f"{noise.weight_decay:g}{augmentation}."
    )


def mean_noise_scale(noise: NoiseHistory) -> float:
    """Mean noise scale over the epochs."""
    return fmean(epoch.scale for epoch in noise.epochs)


def _spread(count: int) -> list[int]:
    if count <= _SHOWN:
        return list(range(count))
    return [round(number * (count - 1) / (_SHOWN - 1)) for number in range(_SHOWN)]
