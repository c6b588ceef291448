"""The settings a user gives: a preset name, or a `Fusion` of their own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from intrafusion.methods import METHODS, Method, find_method
from intrafusion.methods.refit import Refit
from intrafusion.ot import COSTS
from intrafusion.ot.plan import MASSES, TARGET_MASSES
from intrafusion.ot.targets import TARGETS

FEATURES = ("filters", "readers", "biases")
SCORE_ON = ("model", "folded")
CORRECTIONS = ("none", "data-free", "calibrated")


@dataclass(frozen=True)
class Fusion:
    """How the channels of a group are merged into the kept ones.

    merge: the method that gives each group its pair (R, S), one of `intrafusion.METHODS`: `paper` (each source's
        coefficients sum to 1, on both sides), `barycentre` (rows averaged, columns summed), `selection` (discard), one
        that you have registered, or one that is imported by name, as `package.module:function`.
    cost: distance between the features of two channels: `l1` (published), `l2`, `cosine`.
    features: which weights two channels are compared by, some of `filters` (that produce the channel), `readers` (the
        weights that read it) and `biases` (folded); `biases` alone tell too little. Kept in this order, as a tuple.
    source_mass: how much each channel weighs: `uniform` or `importance`.
    target_mass: how much each kept channel takes up: `uniform`, `importance`, `free` (each channel goes to its
        nearest kept one) or `partial` (or nowhere, if it is nearer to zero than to any kept one).
    targets: what distances are measured to: the `kept` channels, or `kmeans` / `gmm` centres grown from them.
    score_on: which network the importance metric sees: the user's own `model`, or the batch-norm-`folded` one
        (published).
    correct: `none`, or refit the layers in order against the dense network: on the inputs given as `calibration`
        (`calibrated`), or on synthetic ones that agree with the batch-norms (`data-free`). `merge` then says where the
        rows start; they move to where the group is rebuilt best. A method that looks at inputs or repairs layers
        itself goes with `none` only.
    rescore: with local pruning, score each group on the network as it is when its turn comes (published), instead of
        all of them on the network before the step (torch-pruning). How many channels go does not change.
    descent: with `calibrated` or `data-free`, so many steps of descent by all layers together, towards what the dense
        network gives, after the last refit: minutes instead of seconds.
    seed: of all that is drawn at random: synthetic inputs, how images are augmented, k-means, the Gaussian mixture.

    Raises ValueError, naming the field and what is allowed, for any other value.
    """

    merge: str = "paper"
    cost: str = "l1"
    features: tuple[str, ...] = ("filters", "readers")
    source_mass: str = "uniform"
    target_mass: str = "uniform"
    targets: str = "kept"
    score_on: str = "model"
    correct: str = "none"
    rescore: bool = False
    descent: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in self.choices().items():
            value = getattr(self, name)
            if name == "merge" and isinstance(value, str) and ":" in value:
                continue  # imported when it is needed: see `find_method`
            if value not in allowed:
                raise ValueError(f"Fusion.{name} is {value!r}: choose one of {', '.join(map(repr, allowed))}")
        object.__setattr__(self, "features", _checked_features(self.features))
        if not isinstance(self.rescore, bool):
            raise ValueError(f"Fusion.rescore is {self.rescore!r}: it must be True or False")
        if not isinstance(self.descent, int) or isinstance(self.descent, bool) or self.descent < 0:
            raise ValueError(f"Fusion.descent is {self.descent!r}: it must be a number of steps, 0 or more")
        if self.descent and self.correct == "none":
            raise ValueError(
                f"Fusion.descent is {self.descent}: it goes with correct='calibrated' or 'data-free', "
                f"not {self.correct!r}"
            )
        method = self._merging()
        if self.correct != "none" and (method.inputs != "none" or method.repairs):
            raise ValueError(
                f"Fusion.merge={self.merge!r} looks at inputs or repairs layers itself: correct must be 'none', "
                f"not {self.correct!r}"
            )

    @staticmethod
    def choices() -> dict[str, tuple[str, ...]]:
        """The allowed values of every field that has a fixed choice of one; `features` takes several of `FEATURES`."""
        return {
            "merge": tuple(METHODS),
            "cost": COSTS,
            "source_mass": MASSES,
            "target_mass": TARGET_MASSES,
            "targets": TARGETS,
            "score_on": SCORE_ON,
            "correct": CORRECTIONS,
        }

    @staticmethod
    def preset(name: str, **changes: Any) -> Fusion:
        """The fusion called `name` in `PRESETS`, some fields of it changed: `preset("calibrated", descent=1000)`.

        Raises ValueError, with the names there are, for another name, and TypeError for a field that there is not.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown fusion preset {name!r}: choose one of {', '.join(map(repr, PRESETS))}")
        return replace(PRESETS[name], **changes) if changes else PRESETS[name]

    @staticmethod
    def of(value: str | Fusion) -> Fusion:
        """A preset name or a Fusion, as a Fusion. Raises TypeError for anything else."""
        if isinstance(value, Fusion):
            return value
        if isinstance(value, str):
            return Fusion.preset(value)
        raise TypeError(f"fusion must be a preset name or a Fusion, not {type(value).__name__}")

    def method(self) -> Method:
        """A new object of the method that these settings describe, for one pruning step."""
        if self.correct == "none":
            return self._merging()
        inputs = "calibration" if self.correct == "calibrated" else "synthetic"
        return Refit(self._merging(), inputs, descent=self.descent)

    @property
    def is_discard(self) -> bool:
        """Is this plain torch-pruning?"""
        return self.merge == "selection" and self.correct == "none"

    def _merging(self) -> Method:
        try:
            return find_method(self.merge)()
        except ValueError as error:
            raise ValueError(f"Fusion.merge: {error}") from error

    def discarded(self) -> Fusion:
        """The same scoring, nothing merged."""
        return replace(self, merge="selection", correct="none", descent=0)

    @property
    def name(self) -> str:
        """The preset's name, if there is one that is the same; else all fields that are set."""
        return next((name for name, preset in PRESETS.items() if replace(self, seed=0) == preset), str(self))

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Fusion({', '.join(changed)})"


def _checked_features(value: object) -> tuple[str, ...]:
    """The features in the order of `FEATURES`, so that equal choices are equal settings."""
    allowed = f"choose from {', '.join(map(repr, FEATURES))}"
    if not isinstance(value, tuple | list) or not value:
        raise ValueError(f"Fusion.features is {value!r}: {allowed}, at least one, in a tuple")
    for name in value:
        if name not in FEATURES:
            raise ValueError(f"Fusion.features holds {name!r}: {allowed}")
        if value.count(name) > 1:
            raise ValueError(f"Fusion.features holds {name!r} twice: {allowed}, each once")
    if "filters" not in value and "readers" not in value:
        raise ValueError(f"Fusion.features is {value!r}: channels are compared by 'filters' or 'readers' at least")
    return tuple(name for name in FEATURES if name in value)


PRESETS: dict[str, Fusion] = {
    "data-free": Fusion(merge="barycentre", cost="l2", correct="data-free"),
    "calibrated": Fusion(merge="barycentre", cost="l2", correct="calibrated"),
    "paper": Fusion(merge="paper", score_on="folded", rescore=True),
    "barycentre": Fusion(merge="barycentre", cost="l2"),
    "discard": Fusion(merge="selection"),
}
"""`data-free`, `calibrated`: ours; the plan is only where a descent starts, so its cost is a matrix product. `paper`:
the published method. `barycentre`: mean/sum, exact for duplicates. `discard`: plain torch-pruning.
"""
