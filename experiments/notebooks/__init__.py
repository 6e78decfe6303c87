"""Notebooks that read small results files and draw; `python -m experiments.notebooks` executes them in place."""
