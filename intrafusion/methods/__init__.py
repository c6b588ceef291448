"""What is made of a group of channels: every method, ours and others', is one object behind one socket."""

from intrafusion.methods.method import METHODS, Method, Rule, find_method, merge_rule, method
from intrafusion.ot import merge as _merge

__all__ = ["METHODS", "Method", "Rule", "find_method", "merge_rule", "method"]

method("selection")(_merge.selection)
method("paper")(_merge.paper)
method("barycentre")(_merge.barycentre)
