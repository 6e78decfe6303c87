"""Sweeps over the fields of a recipe: `python -m experiments.sweep --help`."""
