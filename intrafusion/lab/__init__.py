"""Recipes, data sets, networks, training, measurement and reports: everything around the pruner.

The lab imports the pruner; nothing outside the lab and the command line imports the lab.
"""
