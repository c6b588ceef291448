"""What a fusing pruner's interactive step yields: a torch-pruning group that fuses before it cuts."""

from __future__ import annotations

from typing import Any

from torch_pruning._helpers import GroupItem
from torch_pruning.dependency.group import Group


class FusionError(RuntimeError):
    """Fusing a group failed; the message names the group, and the network is as it was before."""


class FusedGroup(Group):
    """A torch-pruning group whose `prune()` fuses the channels that go into those that stay, then cuts."""

    _step: Any
    _view: Any
    _DG: Any

    @classmethod
    def wrap(cls, group: Group, step: Any, view: Any) -> FusedGroup:
        """step: what prunes the group; view: what the step needs for that, held until the last group is gone."""
        wrapped = cls()
        wrapped._group = [item if hasattr(item, "dep") else GroupItem(*item) for item in group._group]
        wrapped._DG, wrapped._step, wrapped._view = group._DG, step, view
        return wrapped

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """Fuse and cut, all or nothing.

        idxs: other root channels to remove than the ones the group was made for.
        Raises FusionError, naming the group, if it fails; the network is then unchanged.
        """
        if idxs is not None:
            root = self._group[0].dep
            group = self._DG.get_pruning_group(root.target.module, root.handler, [int(i) for i in idxs])
            FusedGroup.wrap(group, self._step, self._view).prune(record_history=record_history)
            return
        if not self._group or not len(self._group[0][1]):
            return
        self._step.prune(self, record_history)
