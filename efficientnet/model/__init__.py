"""The network: scaling rules as data, layers, and what each block costs. Knows nothing of optimizers or devices."""
