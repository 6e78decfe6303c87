"""Recipes. `base.py` names every field once; every other file is a short difference from it."""
