"""Recipes: YAML to checked sections, every mistake with its line; grids over their keys."""
