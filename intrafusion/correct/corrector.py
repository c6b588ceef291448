"""What a method has to say while a network is pruned group by group.

`Sequential` is ours; a method of another paper is another object with these five methods.
"""

from __future__ import annotations

from typing import Protocol

from intrafusion.groups.table import GroupTable
from intrafusion.ot import Pair, Plan


class Corrector(Protocol):
    """Chooses the pair (R, S) of every group of one pruning step, and repairs the network around the cuts."""

    def position(self, table: GroupTable) -> int:
        """Groups are cut in increasing order of this."""
        ...

    def refit_until(self, table: GroupTable) -> None:
        """Called before a group is mixed."""
        ...

    def pair(self, table: GroupTable, plan: Plan) -> Pair:
        """The pair for a group: `plan.kept` are the channels that stay."""
        ...

    def note(self, table: GroupTable, pair: Pair) -> None:
        """Called after the pair is written and before torch-pruning cuts the group."""
        ...

    def finish(self) -> None:
        """Called after the last group; by hand-pruned groups (`step(interactive=True)`) after each."""
        ...
