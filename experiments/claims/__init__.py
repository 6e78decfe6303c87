"""The reference's claims, tested small: `python -m experiments.claims --help`."""
