"""Attention blocks that read their numbers of heads from a config while they run, as Phi-3's do.

The layers of a network share one config, so that one of them cannot have fewer heads than the others, not even for as
long as a step takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from intrafusion.groups.heads import DIMS, HEADS, KEY_HEADS, Heads

_NUMBERS = frozenset((*HEADS, *KEY_HEADS, *DIMS))


class ConfigReads:
    """For as long as it lasts, the blocks' modules have configs that tell of being read. found: those that were."""

    def __init__(self, model: nn.Module, blocks: Sequence[Heads]) -> None:
        self.found: set[Heads] = set()
        self._model = model
        self._blocks = [(model.get_submodule(block.name), block) for block in blocks]
        self._before: list[tuple[nn.Module, Any]] = []

    def note(self, forward: Callable[[nn.Module], Any]) -> None:
        """Run the network; whatever it raises is no matter of this."""
        try:
            forward(self._model)
        except Exception:
            self.found.clear()

    def __enter__(self) -> ConfigReads:
        for module, block in self._blocks:
            config = vars(module).get("config")
            if config is not None:
                self._before.append((module, config))
                vars(module)["config"] = _Told(config, lambda block=block: self.found.add(block))
        return self

    def __exit__(self, *error: Any) -> None:
        for module, config in self._before:
            vars(module)["config"] = config


class _Told:
    """A config that tells when a number of heads is read."""

    def __init__(self, config: Any, told: Callable[[], Any]) -> None:
        self.__dict__.update(_config=config, _told=told)

    def __getattr__(self, name: str) -> Any:
        if name in _NUMBERS:
            self._told()
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)
