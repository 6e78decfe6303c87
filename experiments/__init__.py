"""Benchmarks and experiments; nothing imports from here."""
