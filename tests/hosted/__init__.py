"""Torch-Pruning's own tests with our pruners in place of its own: `python -m tests.hosted <folder of its tests>`.

They are in its repository, not in its wheel, and none of them is copied here.
"""
